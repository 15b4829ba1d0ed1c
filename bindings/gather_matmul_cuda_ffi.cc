// flashjax_gather_matmul_cuda: y = x W^T + bias, or its ReLU, on the GPU, for a W in the gather
// layout.
#include "bindings/gather_cuda_ffi.h"
#include "cuda/gather_matmul_launch.h"

namespace ffi = xla::ffi;

namespace flashjax::gather {
namespace {

constexpr char kOp[] = "flashjax_gather_matmul_cuda";

ffi::Error Matmul(cudaStream_t stream, ffi::AnyBuffer x, Words bitmap, Words entries, Words values,
                  ffi::AnyBuffer bias, ffi::RemainingArgs layer, ffi::Result<ffi::AnyBuffer> y,
                  bool relu) {
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "x", x, {ffi::F16, ffi::BF16}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "x", x, {-1, -1}));
  GatherMatmulArgs args{};
  args.n = x.dimensions()[0];
  args.k = x.dimensions()[1];
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "y", *y, {args.n, -1}));
  args.m = y->dimensions()[1];
  const GatherShape shape{args.m, args.k};
  if (args.n > kTokens || args.k % 8 != 0 || !shape.fits()) {
    return Mismatch(kOp, "x", "up to 8 rows, and columns that are a multiple of 8",
                    ShapeText(x.dimensions()));
  }
  FLASHJAX_RETURN_IF_ERROR(PackedArgs(kOp, shape, bitmap, entries, values, layer, &args.packed));
  FLASHJAX_RETURN_IF_ERROR(
      ReadEpilogue(kOp, x.element_type(), bias, args.packed.layers, relu, *y, &args.epilogue));
  args.x = x.untyped_data();
  args.is_bfloat16 = x.element_type() == ffi::BF16;
  if (const char* missing = GatherKernelUnavailable()) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      std::string(kOp) + ": the layout of the weights needs " + missing +
                          ": pack them on the device that uses them");
  }
  return CudaStatus(kOp, LaunchGatherMatmul(args, stream));
}

}  // namespace
}  // namespace flashjax::gather

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxGatherMatmulCuda, flashjax::gather::Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()  // layer
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("relu"),
                              {ffi::Traits::kCmdBufferCompatible});
