// Launching the attention of a decode step.
#ifndef FLASHJAX_CUDA_DECODE_ATTENTION_LAUNCH_H_
#define FLASHJAX_CUDA_DECODE_ATTENTION_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashjax {

struct DecodeAttentionArgs {
  const void* queries;  // (batch, heads, head_dim), float16 or bfloat16, scaled
  const void* keys;     // (batch, heads, slots, head_dim), as the queries or float8_e4m3fn
  const void* values;   // as the keys
  const uint8_t* mask;  // (batch, slots) bool
  const int32_t* used;  // (): the first slots, which have been written; at least 1
  void* outputs;        // as the queries
  int64_t batch, heads, slots, head_dim;
  bool is_bfloat16;
  bool is_float8_cache;
};

// Whether there is a kernel for heads of this size.
bool DecodeAttentionTakes(int64_t head_dim);

// Enqueues the attention; allocates nothing and does not synchronise.
cudaError_t LaunchDecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream);

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_DECODE_ATTENTION_LAUNCH_H_
