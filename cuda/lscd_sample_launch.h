// Launching the sampling of a dense block at the positions that a packed matrix stores.
#ifndef FLASHJAX_CUDA_LSCD_SAMPLE_LAUNCH_H_
#define FLASHJAX_CUDA_LSCD_SAMPLE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/lscd_layout.h"

namespace flashjax {

struct LscdSampleArgs {
  LscdShape shape;
  const float* block;      // (16 * strips, k), rows of W from strip *first_strip on
  const uint32_t* bitmap;  // the packed layout, cpu/lscd_layout.h
  const uint32_t* entries;
  const int32_t* first_strip;  // on the device; clamped to [0, shape.strips() - strips]
  int64_t strips;
  float* slots;  // [16 * segments words][32 lanes][2 streams]; those of other strips stay
  int64_t segments;
};

cudaError_t LaunchLscdSample(const LscdSampleArgs& args, cudaStream_t stream);

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_SAMPLE_LAUNCH_H_
