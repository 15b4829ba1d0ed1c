// Reporting the errors of launches.
#ifndef FLASHJAX_BINDINGS_CUDA_STATUS_H_
#define FLASHJAX_BINDINGS_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace flashjax {

inline ::xla::ffi::Error CudaStatus(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return ::xla::ffi::Error::Success();
  return ::xla::ffi::Error::Internal(std::string(op) + ": " + cudaGetErrorName(error) + ": " +
                                     cudaGetErrorString(error));
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_CUDA_STATUS_H_
