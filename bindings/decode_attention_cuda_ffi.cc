// flashjax_decode_attention_cuda: attention of one new token of every sequence to a cache.
#include "bindings/cuda_status.h"
#include "bindings/ffi_helpers.h"
#include "cuda/decode_attention_launch.h"

namespace ffi = xla::ffi;

namespace flashjax {
namespace {

constexpr char kOp[] = "flashjax_decode_attention_cuda";

ffi::Error Attend(cudaStream_t stream, ffi::AnyBuffer queries, ffi::AnyBuffer keys,
                  ffi::AnyBuffer values, ffi::AnyBuffer mask, ffi::AnyBuffer used,
                  ffi::Result<ffi::AnyBuffer> outputs) {
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "queries", queries, {ffi::F16, ffi::BF16}));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "keys", keys, {queries.element_type(), ffi::F8E4M3FN}));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "values", values, {keys.element_type()}));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "mask", mask, {ffi::PRED}));
  FLASHJAX_RETURN_IF_ERROR(CheckInt32(kOp, "used", used));
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "outputs", *outputs, {queries.element_type()}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "keys", keys, {-1, -1, -1, -1}));
  DecodeAttentionArgs args{};
  args.batch = keys.dimensions()[0];
  args.heads = keys.dimensions()[1];
  args.slots = keys.dimensions()[2];
  args.head_dim = keys.dimensions()[3];
  if (!DecodeAttentionTakes(args.head_dim)) {
    return Mismatch(kOp, "keys", "heads of 64 or 128", ShapeText(keys.dimensions()));
  }
  const auto query = {args.batch, args.heads, args.head_dim};
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "queries", queries, query));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "outputs", *outputs, query));
  FLASHJAX_RETURN_IF_ERROR(
      CheckShape(kOp, "values", values, {args.batch, args.heads, args.slots, args.head_dim}));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "mask", mask, {args.batch, args.slots}));
  args.queries = queries.untyped_data();
  args.keys = keys.untyped_data();
  args.values = values.untyped_data();
  args.mask = static_cast<const uint8_t*>(mask.untyped_data());
  args.used = static_cast<const int32_t*>(used.untyped_data());
  args.outputs = outputs->untyped_data();
  args.is_bfloat16 = queries.element_type() == ffi::BF16;
  args.is_float8_cache = keys.element_type() == ffi::F8E4M3FN;
  return CudaStatus(kOp, LaunchDecodeAttention(args, stream));
}

}  // namespace
}  // namespace flashjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxDecodeAttentionCuda, flashjax::Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
