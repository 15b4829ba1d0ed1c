#include "cuda/common/launch.h"
#include "cuda/lscd_sample.cuh"
#include "cuda/lscd_sample_launch.h"

namespace flashjax {

cudaError_t LaunchLscdSample(const LscdSampleArgs& args, cudaStream_t stream) {
  const int64_t warps = args.strips * args.shape.entries();
  if (warps == 0 || args.segments == 0) return cudaSuccess;
  return Launch(SampleKernel, {CeilDiv(warps, kSampleWarps), kSampleWarps * kLanes}, stream, args);
}

}  // namespace flashjax
