// Whether kernels that are written for Hopper can run.
#ifndef FLASHJAX_CUDA_COMMON_HOPPER_H_
#define FLASHJAX_CUDA_COMMON_HOPPER_H_

#include "cuda/common/device_value.h"

namespace flashjax {

// What they need and do not find, or null. Built for other architectures they do nothing but trap.
inline const char* HopperUnavailable() {
#if !defined(FLASHJAX_HAS_SM90A)
  return "a build for sm_90a (CUDAARCHS=90a)";
#else
  return DeviceAttribute<cudaDevAttrComputeCapabilityMajor>() == 9 ? nullptr
                                                                   : "a Hopper GPU (sm_90a)";
#endif
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_HOPPER_H_
