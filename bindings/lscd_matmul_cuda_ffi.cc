// flashjax_lscd_matmul_cuda: y = x W^T + bias, or its ReLU, on the GPU.
#include "bindings/lscd_cuda_ffi.h"
#include "cuda/lscd_matmul_launch.h"

namespace ffi = xla::ffi;

namespace flashjax {
namespace {

constexpr char kOp[] = "flashjax_lscd_matmul_cuda";

ffi::Error Matmul(cudaStream_t stream, ffi::AnyBuffer x, Words bitmap, Words entries, Words values,
                  ffi::AnyBuffer bias, ffi::RemainingArgs layer, ffi::Result<ffi::AnyBuffer> y,
                  ffi::Result<ffi::Buffer<ffi::U8>> workspace, int64_t kernel, bool relu) {
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "x", x, {ffi::F16, ffi::BF16}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "x", x, {-1, -1}));
  const int64_t n = x.dimensions()[0], k = x.dimensions()[1];
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "y", *y, {n, -1}));
  const int64_t m = y->dimensions()[1];
  LscdMatmulArgs args{};
  FLASHJAX_RETURN_IF_ERROR(
      PackedArgs(kOp, LscdShape{m, k}, bitmap, entries, values, layer, &args.packed));
  FLASHJAX_RETURN_IF_ERROR(
      ReadEpilogue(kOp, x.element_type(), bias, args.packed.layers, relu, *y, &args.epilogue));
  if (kernel < 0 || kernel > static_cast<int64_t>(LscdKernel::kWgmma)) {
    return Mismatch(kOp, "kernel", "0 (auto), 1 (mma) or 2 (wgmma)", std::to_string(kernel));
  }

  args.x = x.untyped_data();
  args.workspace = workspace->untyped_data();
  args.workspace_bytes = workspace->size_bytes();
  args.n = n;
  args.m = m;
  args.k = k;
  args.is_bfloat16 = x.element_type() == ffi::BF16;
  args.kernel = static_cast<LscdKernel>(kernel);
  if (const char* missing = LscdKernelUnavailable(args)) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      std::string(kOp) + ": the chosen kernel needs " + missing);
  }
  return CudaStatus(kOp, LaunchLscdMatmul(args, stream));
}

}  // namespace
}  // namespace flashjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxLscdMatmulCuda, flashjax::Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()  // layer
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("kernel")
                                  .Attr<bool>("relu"),
                              {ffi::Traits::kCmdBufferCompatible});
