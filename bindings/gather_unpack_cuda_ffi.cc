// flashjax_gather_unpack_cuda: a W in the gather layout to a dense matrix, on the GPU.
#include "bindings/gather_cuda_ffi.h"
#include "cuda/gather_unpack_launch.h"

namespace ffi = xla::ffi;

namespace flashjax::gather {
namespace {

constexpr char kOp[] = "flashjax_gather_unpack_cuda";

ffi::Error Unpack(cudaStream_t stream, Words bitmap, Words entries, Words values,
                  ffi::RemainingArgs layer, ffi::Result<ffi::AnyBuffer> dense, bool transposed) {
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "dense", *dense, {ffi::F16, ffi::BF16}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "dense", *dense, {-1, -1}));
  const int64_t rows = dense->dimensions()[0], columns = dense->dimensions()[1];
  const GatherShape shape{transposed ? columns : rows, transposed ? rows : columns};
  GatherPackedArgs packed{};
  FLASHJAX_RETURN_IF_ERROR(PackedArgs(kOp, shape, bitmap, entries, values, layer, &packed));
  return CudaStatus(kOp, LaunchGatherUnpack(packed, shape.m, shape.k, transposed,
                                            static_cast<uint16_t*>(dense->untyped_data()), stream));
}

}  // namespace
}  // namespace flashjax::gather

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxGatherUnpackCuda, flashjax::gather::Unpack,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()  // layer
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed"),
                              {ffi::Traits::kCmdBufferCompatible});
