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

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_LSCD_PACKED_FFI_H_
