// What the CUDA handlers share: reading the packed operands and reporting launch errors.
#ifndef FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_
#define FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_

#include <cuda_runtime_api.h>

#include <string>

#include "bindings/lscd_packed_ffi.h"

namespace flashjax {

inline const uint32_t* WordData(const Words& buffer) {
  return static_cast<const uint32_t*>(buffer.untyped_data());
}

inline ::xla::ffi::Error CudaStatus(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return ::xla::ffi::Error::Success();
  return ::xla::ffi::Error::Internal(std::string(op) + ": " + cudaGetErrorName(error) + ": " +
                                     cudaGetErrorString(error));
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_
