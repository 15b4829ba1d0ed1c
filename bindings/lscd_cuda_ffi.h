// What the CUDA handlers of packed weights share: reading their operands.
#ifndef FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_
#define FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_

#include "bindings/cuda_status.h"
#include "bindings/lscd_packed_ffi.h"
#include "cuda/lscd_packed_args.h"

namespace flashjax {

inline const uint32_t* WordData(const Words& buffer) {
  return static_cast<const uint32_t*>(buffer.untyped_data());
}

// Fills `packed` from the arrays of a matrix of this shape, or of a stack of such and the index
// into it (`layer`, else empty); or says what does not fit.
inline ::xla::ffi::Error PackedArgs(const char* op, const LscdShape& shape, const Words& bitmap,
                                    const Words& entries, const Words& values,
                                    const ::xla::ffi::RemainingArgs& layer,
                                    LscdPackedArgs* packed) {
  *packed = {WordData(bitmap), WordData(entries), WordData(values)};
  if (layer.size() == 0) return CheckPacked(op, shape, bitmap, entries, values);
  const auto index = layer.get<::xla::ffi::AnyBuffer>(0);
  if (index.has_error()) return index.error();
  FLASHJAX_RETURN_IF_ERROR(CheckStack(op, shape, bitmap, entries, values, index.value()));
  packed->layer = static_cast<const int32_t*>(index.value().untyped_data());
  packed->layers = values.dimensions()[0];
  packed->segments = values.dimensions()[1];
  return ::xla::ffi::Error::Success();
}

// A bias of x's type or float32: (m,), (layers, m) where there are layers, or empty for none.
inline ::xla::ffi::Error CheckBias(const char* op, const ::xla::ffi::AnyBuffer& bias,
                                   ::xla::ffi::DataType x_type, int64_t layers, int64_t m) {
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "bias", bias, {x_type, ::xla::ffi::DataType::F32}));
  if (layers > 0) return CheckShape(op, "bias", bias, {layers, m});
  if (bias.element_count() == 0) return ::xla::ffi::Error::Success();
  return CheckShape(op, "bias", bias, {m});
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_
