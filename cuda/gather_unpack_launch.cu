#include "cuda/common/launch.h"
#include "cuda/gather_unpack.cuh"
#include "cuda/gather_unpack_launch.h"

namespace flashjax::gather {

cudaError_t LaunchGatherUnpack(const GatherPackedArgs& packed, int64_t m, int64_t k,
                               bool transposed, uint16_t* dense, cudaStream_t stream) {
  if (m == 0 || k == 0) return cudaSuccess;
  const GatherShape shape{m, k};
  if (!shape.fits()) return cudaErrorInvalidValue;
  const cudaError_t error = cudaMemsetAsync(dense, 0, static_cast<size_t>(m * k) * 2, stream);
  if (error != cudaSuccess) return error;
  const DensePlace out = transposed ? DensePlace{dense, m, 1, m} : DensePlace{dense, m, k, 1};
  return Launch(UnpackKernel, {shape.strips(), kUnpackWarps * kLanes}, stream,
                MakePackedGather(packed, shape), out);
}

}  // namespace flashjax::gather
