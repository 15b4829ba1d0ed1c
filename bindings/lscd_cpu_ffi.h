// What the CPU handlers share: decoding a packed matrix and dtypes.
#ifndef FLASHJAX_BINDINGS_LSCD_CPU_FFI_H_
#define FLASHJAX_BINDINGS_LSCD_CPU_FFI_H_

#include <algorithm>
#include <cstdint>
#include <string>

#include "bindings/lscd_packed_ffi.h"
#include "cpu/simd.h"
#include "xla/ffi/api/ffi.h"

namespace flashjax {

// Where one matrix of a stack begins, in words of each of its arrays.
struct StackOffsets {
  int64_t bitmap = 0, entries = 0, values = 0;
};

// An index out of range means the nearest layer, as for JAX's dynamic slices.
inline ::xla::ffi::Error LocateLayer(const char* op, const LscdShape& shape, const Words& bitmap,
                                     const Words& entries, const Words& values,
                                     const ::xla::ffi::AnyBuffer& layer, StackOffsets* offsets) {
  FLASHJAX_RETURN_IF_ERROR(CheckStack(op, shape, bitmap, entries, values, layer));
  const int64_t layers = values.dimensions()[0];
  const int64_t index =
      std::clamp<int64_t>(*static_cast<const int32_t*>(layer.untyped_data()), 0, layers - 1);
  *offsets = {index * shape.strips() * shape.groups() * kLanes * kGroupSteps,
              index * shape.strips() * shape.entries() * kEntryWords,
              index * values.dimensions()[1] * kSegmentWords * kLanes};
  return ::xla::ffi::Error::Success();
}

// Fills `w` from the leaves of a matrix of this shape, or says what does not fit. `weight_dtype` is
// 0 for float16, 1 for bfloat16. `layer` is empty, or the index into a stack of matrices.
inline ::xla::ffi::Error DecodeMatrix(const char* op, int64_t k, int64_t m,
                                      ::xla::ffi::AnyBuffer bitmap, ::xla::ffi::AnyBuffer entries,
                                      ::xla::ffi::AnyBuffer values, int64_t weight_dtype,
                                      ::xla::ffi::RemainingArgs layer, LscdMatrix* w) {
  const LscdShape shape{m, k};
  StackOffsets offsets;
  if (layer.size() == 0) {
    FLASHJAX_RETURN_IF_ERROR(CheckPacked(op, shape, bitmap, entries, values));
  } else {
    const auto index = layer.get<::xla::ffi::AnyBuffer>(0);
    if (index.has_error()) return index.error();
    FLASHJAX_RETURN_IF_ERROR(
        LocateLayer(op, shape, bitmap, entries, values, index.value(), &offsets));
  }
  if (weight_dtype != 0 && weight_dtype != 1) {
    return Mismatch(op, "weight_dtype", "0 (float16) or 1 (bfloat16)",
                    std::to_string(weight_dtype));
  }
  *w = {shape,
        weight_dtype == 0 ? HalfType::kFloat16 : HalfType::kBfloat16,
        static_cast<const uint32_t*>(bitmap.untyped_data()) + offsets.bitmap,
        static_cast<const uint32_t*>(entries.untyped_data()) + offsets.entries,
        static_cast<const uint32_t*>(values.untyped_data()) + offsets.values,
        values.dimensions()[values.dimensions().size() - 3]};
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
