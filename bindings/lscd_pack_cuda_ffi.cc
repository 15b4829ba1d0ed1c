// flashjax_lscd_{unpack,pack_sizes,pack}_cuda: between dense and packed weights. The packers take
// (k, m), as SparseMatrix has it; the unpacker gives W itself, (m, k), or with `transposed` (k, m).
#include "bindings/lscd_cuda_ffi.h"
#include "cuda/lscd_pack_launch.h"

namespace ffi = xla::ffi;

namespace flashjax {
namespace {

uint32_t* ResultData(ffi::Result<Words>& buffer) {
  return static_cast<uint32_t*>(buffer->untyped_data());
}

template <typename Buffer>
ffi::Error CheckDense(const char* op, const Buffer& dense) {
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, "dense", dense, {ffi::F16, ffi::BF16}));
  return CheckShape(op, "dense", dense, {-1, -1});
}

template <typename Buffer>
LscdShape DenseShape(const Buffer& dense) {
  return LscdShape{dense.dimensions()[1], dense.dimensions()[0]};
}

ffi::Error Unpack(cudaStream_t stream, Words bitmap, Words entries, Words values,
                  ffi::RemainingArgs layer, ffi::Result<ffi::AnyBuffer> dense, bool transposed) {
  constexpr char kOp[] = "flashjax_lscd_unpack_cuda";
  FLASHJAX_RETURN_IF_ERROR(CheckDense(kOp, *dense));
  LscdShape shape = DenseShape(*dense);
  if (!transposed) shape = LscdShape{shape.k, shape.m};
  LscdPackedArgs packed{};
  FLASHJAX_RETURN_IF_ERROR(PackedArgs(kOp, shape, bitmap, entries, values, layer, &packed));
  return CudaStatus(kOp, LaunchLscdUnpack(packed, shape.m, shape.k, transposed,
                                          static_cast<uint16_t*>(dense->untyped_data()), stream));
}

ffi::Error PackSizes(cudaStream_t stream, ffi::AnyBuffer dense, ffi::Result<Words> chain_segments) {
  constexpr char kOp[] = "flashjax_lscd_pack_sizes_cuda";
  FLASHJAX_RETURN_IF_ERROR(CheckDense(kOp, dense));
  const LscdShape shape = DenseShape(dense);
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "chain_segments", *chain_segments, {ffi::U32}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "chain_segments", *chain_segments, {shape.chains()}));
  return CudaStatus(kOp, LaunchLscdPackSizes(static_cast<const uint16_t*>(dense.untyped_data()),
                                             shape.m, shape.k, ResultData(chain_segments), stream));
}

ffi::Error Pack(cudaStream_t stream, ffi::AnyBuffer dense, Words chain_segments,
                ffi::Result<Words> bitmap, ffi::Result<Words> entries, ffi::Result<Words> values,
                ffi::Result<Words> counts) {
  constexpr char kOp[] = "flashjax_lscd_pack_cuda";
  FLASHJAX_RETURN_IF_ERROR(CheckDense(kOp, dense));
  const LscdShape shape = DenseShape(dense);
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "chain_segments", chain_segments, {ffi::U32}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "chain_segments", chain_segments, {shape.chains()}));
  FLASHJAX_RETURN_IF_ERROR(CheckPacked(kOp, shape, *bitmap, *entries, *values));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "counts", *counts, {ffi::U32}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "counts", *counts, {shape.strips()}));
  return CudaStatus(
      kOp, LaunchLscdPack(static_cast<const uint16_t*>(dense.untyped_data()), shape.m, shape.k,
                          WordData(chain_segments), values->dimensions()[0], ResultData(bitmap),
                          ResultData(entries), ResultData(values), ResultData(counts), stream));
}

}  // namespace
}  // namespace flashjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxLscdUnpackCuda, flashjax::Unpack,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()  // layer
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxLscdPackSizesCuda, flashjax::PackSizes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxLscdPackCuda, flashjax::Pack,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
