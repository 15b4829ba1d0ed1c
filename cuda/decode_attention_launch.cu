#include "cuda/common/device_value.h"
#include "cuda/common/launch.h"
#include "cuda/decode_attention.cuh"
#include "cuda/decode_attention_launch.h"

namespace flashjax {
namespace {

// Few heads do not fill the GPU: each gets more warps then.
int Warps(int64_t heads) {
  const int64_t multiprocessors = DeviceAttribute<cudaDevAttrMultiProcessorCount>();
  return heads >= 4 * multiprocessors ? 4 : heads >= 2 * multiprocessors ? 8 : 16;
}

template <typename T, typename Cache, int kHeadDim>
cudaError_t LaunchKernel(const DecodeAttentionArgs& args, cudaStream_t stream) {
  const DecodeAttention p{args.queries,
                          args.keys,
                          args.values,
                          args.mask,
                          args.used,
                          args.outputs,
                          static_cast<int>(args.heads),
                          static_cast<int>(args.slots)};
  const int64_t heads = args.batch * args.heads;
  return Launch(&DecodeAttentionKernel<T, Cache, kHeadDim>, {heads, 32 * Warps(heads)}, stream, p);
}

template <typename T, typename Cache>
cudaError_t LaunchHeads(const DecodeAttentionArgs& args, cudaStream_t stream) {
  return args.head_dim == 64 ? LaunchKernel<T, Cache, 64>(args, stream)
                             : LaunchKernel<T, Cache, 128>(args, stream);
}

template <typename T>
cudaError_t LaunchCache(const DecodeAttentionArgs& args, cudaStream_t stream) {
  return args.is_float8_cache ? LaunchHeads<T, Float8>(args, stream)
                              : LaunchHeads<T, T>(args, stream);
}

}  // namespace

bool DecodeAttentionTakes(int64_t head_dim) { return head_dim == 64 || head_dim == 128; }

cudaError_t LaunchDecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream) {
  if (args.batch == 0 || args.heads == 0) return cudaSuccess;
  if (!DecodeAttentionTakes(args.head_dim) || args.slots < 1 || args.slots > INT32_MAX ||
      args.batch * args.heads > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  return args.is_bfloat16 ? LaunchCache<__nv_bfloat16>(args, stream)
                          : LaunchCache<__half>(args, stream);
}

}  // namespace flashjax
