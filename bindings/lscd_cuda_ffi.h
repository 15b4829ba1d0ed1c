// What the CUDA handlers of packed weights share: reading their operands.
#ifndef FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_
#define FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_

#include "bindings/cuda_status.h"
#include "bindings/lscd_packed_ffi.h"
#include "cuda/epilogue_args.h"
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

// Fills `args` from y (n, m), of x's type or float32, and from a bias of x's type or float32: (m,),
// also (layers, m) if there are layers, or empty for none; or says what does not fit.
inline ::xla::ffi::Error ReadEpilogue(const char* op, ::xla::ffi::DataType x_type,
                                      const ::xla::ffi::AnyBuffer& bias, int64_t layers, bool relu,
                                      ::xla::ffi::AnyBuffer& y, EpilogueArgs* args) {
  using ::xla::ffi::DataType;
  const int64_t m = y.dimensions()[1];
  const bool is_stacked = layers > 0 && bias.dimensions().size() == 2;
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "y", y, {x_type, DataType::F32}));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "bias", bias, {x_type, DataType::F32}));
  if (is_stacked) {
    FLASHJAX_RETURN_IF_ERROR(CheckShape(op, "bias", bias, {layers, m}));
  } else if (bias.element_count() > 0) {
    FLASHJAX_RETURN_IF_ERROR(CheckShape(op, "bias", bias, {m}));
  }
  *args = {y.untyped_data(),
           bias.element_count() > 0 ? bias.untyped_data() : nullptr,
           y.element_type() == DataType::F32,
           bias.element_type() == DataType::F32,
           is_stacked,
           relu};
  return ::xla::ffi::Error::Success();
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_LSCD_CUDA_FFI_H_
