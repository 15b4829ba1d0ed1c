// What the handlers of flashjax_lscd_sample_{cpu,cuda} check.
#ifndef FLASHJAX_BINDINGS_LSCD_SAMPLE_FFI_H_
#define FLASHJAX_BINDINGS_LSCD_SAMPLE_FFI_H_

#include "bindings/ffi_helpers.h"
#include "cpu/lscd_layout.h"

namespace flashjax {

// block (16 b, K), bitmap and entries of a (M, K) matrix with at least b strips, first_strip (),
// slots (segments, 16, 32, 2) twice: the operand and the result.
template <typename Buffer, typename Result>
::xla::ffi::Error CheckSample(const char* op, const Buffer& block, const Buffer& bitmap,
                              const Buffer& entries, const Buffer& first_strip, const Buffer& slots,
                              const Result& result, LscdShape* shape) {
  using ::xla::ffi::DataType;
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "block", block, {DataType::F32}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(op, "block", block, {-1, -1}));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "bitmap", bitmap, {DataType::U32}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(op, "bitmap", bitmap, {-1, -1, kLanes, kGroupSteps}));
  *shape = LscdShape{bitmap.dimensions()[0] * kStripRows, block.dimensions()[1]};
  FLASHJAX_RETURN_IF_ERROR(
      CheckShape(op, "bitmap", bitmap, {shape->strips(), shape->groups(), kLanes, kGroupSteps}));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "entries", entries, {DataType::U32}));
  FLASHJAX_RETURN_IF_ERROR(
      CheckShape(op, "entries", entries, {shape->strips(), shape->entries(), kEntryWords}));
  const int64_t rows = block.dimensions()[0];
  if (rows % kStripRows != 0 || rows > shape->m) {
    return Mismatch(op, "block",
                    "a multiple of " + std::to_string(kStripRows) + " rows, at most " +
                        std::to_string(shape->m),
                    std::to_string(rows));
  }
  FLASHJAX_RETURN_IF_ERROR(CheckInt32(op, "first_strip", first_strip));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "slots", slots, {DataType::F32}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(op, "slots", slots, {-1, kSegmentWords, kLanes, 2}));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "result", result, {DataType::F32}));
  return CheckShape(op, "result", result, {slots.dimensions()[0], kSegmentWords, kLanes, 2});
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_LSCD_SAMPLE_FFI_H_
