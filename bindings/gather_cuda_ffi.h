// Reading the operands of a W in the gather layout, for the CUDA handlers.
#ifndef FLASHJAX_BINDINGS_GATHER_CUDA_FFI_H_
#define FLASHJAX_BINDINGS_GATHER_CUDA_FFI_H_

#include "bindings/lscd_cuda_ffi.h"
#include "cpu/gather_layout.h"
#include "cuda/gather_packed_args.h"

namespace flashjax::gather {

// Fills `packed` from the arrays of a matrix of this shape, or of a stack of such and the index
// into it (`layer`, else empty); or says what does not fit.
inline ::xla::ffi::Error PackedArgs(const char* op, const GatherShape& shape, const Words& bitmap,
                                    const Words& entries, const Words& values,
                                    const ::xla::ffi::RemainingArgs& layer,
                                    GatherPackedArgs* packed) {
  namespace ffi = ::xla::ffi;
  for (const auto* words : {&bitmap, &entries, &values}) {
    FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "packed", *words, {ffi::U32}));
  }
  *packed = {WordData(bitmap), WordData(entries), WordData(values)};
  const int64_t strips = shape.strips() + 1, words = shape.entry_words();
  const auto sizes = values.dimensions();
  if (layer.size() == 0) {
    const int64_t chunks = sizes.size() == 3 ? sizes[0] : -1;
    FLASHJAX_RETURN_IF_ERROR(CheckShape(op, "values", values, {chunks, kLanes, 4}));
    FLASHJAX_RETURN_IF_ERROR(CheckShape(op, "bitmap", bitmap, {chunks, kLanes, 2}));
    return CheckShape(op, "entries", entries, {strips, words});
  }
  const auto index = layer.get<ffi::AnyBuffer>(0);
  if (index.has_error()) return index.error();
  FLASHJAX_RETURN_IF_ERROR(CheckInt32(op, "layer", index.value()));
  packed->layers = sizes.size() == 4 ? sizes[0] : -1;
  packed->chunks = sizes.size() == 4 ? sizes[1] : -1;
  FLASHJAX_RETURN_IF_ERROR(
      CheckShape(op, "values", values, {packed->layers, packed->chunks, kLanes, 4}));
  FLASHJAX_RETURN_IF_ERROR(
      CheckShape(op, "bitmap", bitmap, {packed->layers, packed->chunks, kLanes, 2}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(op, "entries", entries, {packed->layers, strips, words}));
  if (packed->layers < 1) return Mismatch(op, "stack", "at least one layer", "none");
  packed->layer = static_cast<const int32_t*>(index.value().untyped_data());
  return ffi::Error::Success();
}

}  // namespace flashjax::gather

#endif  // FLASHJAX_BINDINGS_GATHER_CUDA_FFI_H_
