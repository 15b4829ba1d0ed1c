// Launching y = x W^T + bias for a W in the gather layout, for few rows of x.
#ifndef FLASHJAX_CUDA_GATHER_MATMUL_LAUNCH_H_
#define FLASHJAX_CUDA_GATHER_MATMUL_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/epilogue_args.h"
#include "cuda/gather_packed_args.h"

namespace flashjax::gather {

struct GatherMatmulArgs {
  const void* x;  // (n, k), float16 or bfloat16; 4-byte aligned
  GatherPackedArgs packed;
  EpilogueArgs epilogue;
  int64_t n, m, k;  // n up to kTokens; k a multiple of 8 that rounds up W's columns
  bool is_bfloat16;
};

// What the current device lacks for this kernel, or nullptr.
const char* GatherKernelUnavailable();

// Enqueues the product; allocates nothing and does not synchronise.
cudaError_t LaunchGatherMatmul(const GatherMatmulArgs& args, cudaStream_t stream);

}  // namespace flashjax::gather

#endif  // FLASHJAX_CUDA_GATHER_MATMUL_LAUNCH_H_
