// What the CPU handlers share: decoding a packed matrix and dtypes.
#ifndef FLASHJAX_BINDINGS_LSCD_CPU_FFI_H_
#define FLASHJAX_BINDINGS_LSCD_CPU_FFI_H_

#include <cstdint>
#include <string>

#include "bindings/lscd_packed_ffi.h"
#include "cpu/simd.h"
#include "xla/ffi/api/ffi.h"

namespace flashjax {

// Fills `w` from the leaves of a matrix of this shape, or says what does not fit. `weight_dtype` is
// 0 for float16, 1 for bfloat16.
inline ::xla::ffi::Error DecodeMatrix(const char* op, int64_t k, int64_t m,
                                      ::xla::ffi::AnyBuffer bitmap, ::xla::ffi::AnyBuffer entries,
                                      ::xla::ffi::AnyBuffer values, int64_t weight_dtype,
                                      LscdMatrix* w) {
  const LscdShape shape{m, k};
  FLASHJAX_RETURN_IF_ERROR(CheckPacked(op, shape, bitmap, entries, values));
  if (weight_dtype != 0 && weight_dtype != 1) {
    return Mismatch(op, "weight_dtype", "0 (float16) or 1 (bfloat16)",
                    std::to_string(weight_dtype));
  }
  *w = {shape,
        weight_dtype == 0 ? HalfType::kFloat16 : HalfType::kBfloat16,
        static_cast<const uint32_t*>(bitmap.untyped_data()),
        static_cast<const uint32_t*>(entries.untyped_data()),
        static_cast<const uint32_t*>(values.untyped_data()),
        values.dimensions()[0]};
  return ::xla::ffi::Error::Success();
}

// Of a dtype that CheckDtype has let through.
inline FloatType ToFloatType(::xla::ffi::DataType dtype) {
  using ::xla::ffi::DataType;
  return dtype == DataType::F16    ? FloatType::kFloat16
         : dtype == DataType::BF16 ? FloatType::kBfloat16
                                   : FloatType::kFloat32;
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_LSCD_CPU_FFI_H_
