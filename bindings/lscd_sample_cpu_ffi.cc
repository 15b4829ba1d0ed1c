#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bindings/ffi_thread_pool.h"
#include "bindings/lscd_sample_ffi.h"
#include "cpu/lscd_sample.h"
#include "xla/ffi/api/ffi.h"

namespace flashjax {
namespace {

namespace ffi = ::xla::ffi;

// The result is the operand `slots`, in the same memory where XLA can arrange that, with the slots
// of some strips overwritten. first_strip is clamped like the start of a dynamic slice.
ffi::Error LscdSampleCpu(ffi::ThreadPool pool, ffi::AnyBuffer block, ffi::AnyBuffer bitmap,
                         ffi::AnyBuffer entries, ffi::AnyBuffer first_strip, ffi::AnyBuffer slots,
                         ffi::Result<ffi::AnyBuffer> result) {
  LscdShape shape;
  FLASHJAX_RETURN_IF_ERROR(CheckSample("flashjax_lscd_sample_cpu", block, bitmap, entries,
                                       first_strip, slots, *result, &shape));
  if (result->untyped_data() != slots.untyped_data()) {
    std::memcpy(result->untyped_data(), slots.untyped_data(), slots.size_bytes());
  }
  const int64_t strips = block.dimensions()[0] / kStripRows;
  const int64_t asked = *static_cast<const int32_t*>(first_strip.untyped_data());
  const int64_t first = std::max<int64_t>(0, std::min(asked, shape.strips() - strips));
  const LscdSlots w{shape, static_cast<const uint32_t*>(bitmap.untyped_data()),
                    static_cast<const uint32_t*>(entries.untyped_data()),
                    static_cast<float*>(result->untyped_data()), slots.dimensions()[0]};
  LscdSample(w, static_cast<const float*>(block.untyped_data()), first, strips, PoolThreads(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace flashjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxLscdSampleCpu, flashjax::LscdSampleCpu,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()    // block
                                  .Arg<xla::ffi::AnyBuffer>()    // bitmap
                                  .Arg<xla::ffi::AnyBuffer>()    // entries
                                  .Arg<xla::ffi::AnyBuffer>()    // first_strip
                                  .Arg<xla::ffi::AnyBuffer>()    // slots
                                  .Ret<xla::ffi::AnyBuffer>());  // slots
