// Launching kernels through the runtime's functions: launchers stay plain C++.
#ifndef FLASHJAX_CUDA_COMMON_LAUNCH_H_
#define FLASHJAX_CUDA_COMMON_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashjax {

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  int64_t blocks_y = 1;
};

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_LAUNCH_H_
