#include "bindings/lscd_cuda_ffi.h"
#include "bindings/lscd_sample_ffi.h"
#include "cuda/lscd_sample_launch.h"

namespace flashjax {
namespace {

namespace ffi = ::xla::ffi;

// The result is the operand `slots`, in the same memory where XLA can arrange that, with the slots
// of some strips overwritten.
ffi::Error LscdSampleCuda(cudaStream_t stream, ffi::AnyBuffer block, ffi::AnyBuffer bitmap,
                          ffi::AnyBuffer entries, ffi::AnyBuffer first_strip, ffi::AnyBuffer slots,
                          ffi::Result<ffi::AnyBuffer> result) {
  constexpr char kOp[] = "flashjax_lscd_sample_cuda";
  LscdSampleArgs args{};
  FLASHJAX_RETURN_IF_ERROR(
      CheckSample(kOp, block, bitmap, entries, first_strip, slots, *result, &args.shape));
  if (result->untyped_data() != slots.untyped_data()) {
    FLASHJAX_RETURN_IF_ERROR(
        CudaStatus(kOp, cudaMemcpyAsync(result->untyped_data(), slots.untyped_data(),
                                        slots.size_bytes(), cudaMemcpyDeviceToDevice, stream)));
  }
  args.block = static_cast<const float*>(block.untyped_data());
  args.bitmap = WordData(bitmap);
  args.entries = WordData(entries);
  args.first_strip = static_cast<const int32_t*>(first_strip.untyped_data());
  args.strips = block.dimensions()[0] / kStripRows;
  args.slots = static_cast<float*>(result->untyped_data());
  args.segments = slots.dimensions()[0];
  return CudaStatus(kOp, LaunchLscdSample(args, stream));
}

}  // namespace
}  // namespace flashjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxLscdSampleCuda, flashjax::LscdSampleCuda,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // block
                                  .Arg<xla::ffi::AnyBuffer>()   // bitmap
                                  .Arg<xla::ffi::AnyBuffer>()   // entries
                                  .Arg<xla::ffi::AnyBuffer>()   // first_strip
                                  .Arg<xla::ffi::AnyBuffer>()   // slots
                                  .Ret<xla::ffi::AnyBuffer>(),  // slots
                              {xla::ffi::Traits::kCmdBufferCompatible});
