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
  int cluster = 1;  // blocks of a cluster
};

// A grid as the runtime's functions take it.
class LaunchConfig {
 public:
  explicit LaunchConfig(const Grid& grid, cudaStream_t stream = nullptr) {
    config_.gridDim =
        dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.blocks_y));
    config_.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config_.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config_.stream = stream;
    if (grid.cluster == 1) return;
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
    config_.attrs = &cluster_;
    config_.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute cluster_{};
  cudaLaunchConfig_t config_{};
};

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   const Arguments&... arguments) {
  return cudaLaunchKernelEx(LaunchConfig(grid, stream).get(), kernel, arguments...);
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_LAUNCH_H_
