// The part of the CUDA runtime that cuda/ uses, for the emulated device. Streams are synchronous.
#ifndef FLASHJAX_TESTS_EMULATION_CUDA_RUNTIME_API_H_
#define FLASHJAX_TESTS_EMULATION_CUDA_RUNTIME_API_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>

#include "simt.h"

#define CUDART_VERSION 12050

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
  cudaErrorUnknown = 999,
};

using cudaStream_t = void*;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension,
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
inline constexpr int cudaEnableDefault = 0;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// Settings of the emulated device.
namespace simt {
inline int multiprocessors = 3;  // few, so that small matrices are shared as on a large GPU
inline int capability = 9;

// Dynamic shared memory that kernels may ask for beyond what every kernel may.
inline constexpr size_t kDefaultSharedBytes = 48 << 10;
inline std::map<const void*, size_t> allowed_shared_bytes;
}  // namespace simt

inline unsigned ClusterSize(const cudaLaunchConfig_t* config) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      return config->attrs[i].val.clusterDim.x;
    }
  }
  return 1;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const void* key = reinterpret_cast<const void*>(kernel);
  if (config->dynamicSmemBytes > simt::kDefaultSharedBytes &&
      config->dynamicSmemBytes > simt::allowed_shared_bytes[key]) {
    return cudaErrorInvalidValue;
  }
  const bool done =
      simt::Run(config->gridDim, config->blockDim, ClusterSize(config),
                static_cast<uint32_t>(config->dynamicSmemBytes), [&] { kernel(arguments...); });
  return done ? cudaSuccess : cudaErrorUnknown;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  simt::allowed_shared_bytes[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel,
                                           const cudaLaunchConfig_t* config) {
  *clusters = simt::multiprocessors / static_cast<int>(ClusterSize(config));
  return cudaSuccess;
}

// A number of which launchers keep nothing: the next test may size the GPU anew.
inline cudaError_t cudaGetDevice(int* device) {
  *device = 1 << 20;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? simt::multiprocessors : simt::capability;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) {
  std::memset(p, value, size);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             int flags, cudaDriverEntryPointQueryResult* result);

#endif  // FLASHJAX_TESTS_EMULATION_CUDA_RUNTIME_API_H_
