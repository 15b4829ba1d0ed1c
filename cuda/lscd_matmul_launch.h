// Launching y = x W^T + bias for a packed W.
#ifndef FLASHJAX_CUDA_LSCD_MATMUL_LAUNCH_H_
#define FLASHJAX_CUDA_LSCD_MATMUL_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/epilogue_args.h"
#include "cuda/lscd_packed_args.h"

namespace flashjax {

enum class LscdKernel : int64_t { kAuto = 0, kMma = 1, kWgmma = 2 };

struct LscdMatmulArgs {
  const void* x;  // (n, k), float16 or bfloat16
  LscdPackedArgs packed;
  EpilogueArgs epilogue;
  void* workspace;  // 16-byte aligned; its contents do not matter
  size_t workspace_bytes;
  int64_t n, m, k;  // k may exceed W's columns by what rounds it up to the layout's
  bool is_bfloat16;
  LscdKernel kernel;
};

// A workspace of this size lets the kernels use the whole GPU; a smaller one (but not below that of
// one slot) costs parallelism.
size_t LscdWorkspaceBytes(int64_t n, int64_t m, int64_t k);

// The name of what kernel (if not kAuto) lacks on the current device for this call, or nullptr.
const char* LscdKernelUnavailable(const LscdMatmulArgs& args);

// Enqueues the product; allocates nothing and does not synchronise.
cudaError_t LaunchLscdMatmul(const LscdMatmulArgs& args, cudaStream_t stream);

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_MATMUL_LAUNCH_H_
