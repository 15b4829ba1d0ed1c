// The check of a packed matrix, for the handlers of both platforms.
#ifndef FLASHJAX_BINDINGS_LSCD_PACKED_FFI_H_
#define FLASHJAX_BINDINGS_LSCD_PACKED_FFI_H_

#include "bindings/ffi_helpers.h"
#include "cpu/lscd_layout.h"

namespace flashjax {

using Words = ::xla::ffi::AnyBuffer;

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

// The same for a stack, whose arrays have one dimension more in front, and the index into it.
inline ::xla::ffi::Error CheckStack(const char* op, const LscdShape& shape, const Words& bitmap,
                                    const Words& entries, const Words& values,
                                    const ::xla::ffi::AnyBuffer& layer) {
  using ::xla::ffi::DataType;
  FLASHJAX_RETURN_IF_ERROR(CheckInt32(op, "layer", layer));
  for (const auto* words : {&bitmap, &entries, &values}) {
    FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "stack", *words, {DataType::U32}));
  }
  const auto layers = values.dimensions().size() == 4 ? values.dimensions()[0] : -1;
  FLASHJAX_RETURN_IF_ERROR(CheckShape(op, "values", values, {layers, -1, kSegmentWords, kLanes}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(
      op, "bitmap", bitmap, {layers, shape.strips(), shape.groups(), kLanes, kGroupSteps}));
  FLASHJAX_RETURN_IF_ERROR(
      CheckShape(op, "entries", entries, {layers, shape.strips(), shape.entries(), kEntryWords}));
  if (layers < 1) return Mismatch(op, "stack", "at least one layer", "none");
  return ::xla::ffi::Error::Success();
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_LSCD_PACKED_FFI_H_
