#include "cuda/common/launch.h"
#include "cuda/lscd_pack.cuh"
#include "cuda/lscd_pack_launch.h"

namespace flashjax {
namespace {

Dense MakeDense(const uint16_t* data, int64_t m, int64_t k) {
  return Dense{data, m, k, m % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0};
}

}  // namespace

cudaError_t LaunchLscdPackSizes(const uint16_t* dense, int64_t m, int64_t k,
                                uint32_t* chain_segments, cudaStream_t stream) {
  const LscdShape shape{m, k};
  if (m == 0 || k == 0) {
    return cudaMemsetAsync(chain_segments, 0, shape.chains() * sizeof(uint32_t), stream);
  }
  uint32_t* const none = nullptr;
  uint16_t* const no_values = nullptr;
  return Launch(PackKernel<false>, {shape.chains(), kLanes}, stream, MakeDense(dense, m, k), shape,
                chain_segments, none, none, no_values, none);
}

cudaError_t LaunchLscdPack(const uint16_t* dense, int64_t m, int64_t k,
                           const uint32_t* chain_segments, int64_t segments, uint32_t* bitmap,
                           uint32_t* entries, uint32_t* values, uint32_t* counts,
                           cudaStream_t stream) {
  const LscdShape shape{m, k};
  if (m == 0) return cudaSuccess;
  if (k == 0) return cudaMemsetAsync(counts, 0, shape.strips() * sizeof(uint32_t), stream);
  const cudaError_t error = cudaMemsetAsync(values, 0, segments * kSegmentBytes, stream);
  if (error != cudaSuccess) return error;
  return Launch(PackKernel<true>, {shape.chains(), kLanes}, stream, MakeDense(dense, m, k), shape,
                const_cast<uint32_t*>(chain_segments), bitmap, entries,
                reinterpret_cast<uint16_t*>(values), counts);
}

}  // namespace flashjax
