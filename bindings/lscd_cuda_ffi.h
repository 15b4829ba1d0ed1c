// What the CUDA handlers share: checking the packed operands and reporting launch errors.
#ifndef FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_
#define FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_

#include <cuda_runtime_api.h>

#include <string>

#include "bindings/ffi_helpers.h"
#include "cpu/lscd_layout.h"

namespace flashjax {

using Words = ::xla::ffi::AnyBuffer;

inline const uint32_t* WordData(const Words& buffer) {
  return static_cast<const uint32_t*>(buffer.untyped_data());
}

inline ::xla::ffi::Error CheckPacked(const char* op, const LscdShape& shape, const Words& bitmap,
                                     const Words& entries, const Words& values) {
  using ::xla::ffi::DataType;
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "bitmap", bitmap, {DataType::U32}));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "entries", entries, {DataType::U32}));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "values", values, {DataType::U32}));
  FLASHJAX_RETURN_IF_ERROR(
      CheckShape(op, "bitmap", bitmap, {shape.strips(), shape.groups(), kLanes, kGroupSteps}));
  FLASHJAX_RETURN_IF_ERROR(
      CheckShape(op, "entries", entries, {shape.strips(), shape.entries(), kEntryWords}));
  return CheckShape(op, "values", values, {-1, kSegmentWords, kLanes});
}

inline ::xla::ffi::Error CudaStatus(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return ::xla::ffi::Error::Success();
  return ::xla::ffi::Error::Internal(std::string(op) + ": " + cudaGetErrorName(error) + ": " +
                                     cudaGetErrorString(error));
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_
