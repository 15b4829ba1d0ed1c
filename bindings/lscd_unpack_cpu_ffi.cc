#include <cstdint>
#include <new>

#include "bindings/ffi_helpers.h"
#include "bindings/ffi_thread_pool.h"
#include "bindings/lscd_cpu_ffi.h"
#include "cpu/lscd_matmul.h"
#include "xla/ffi/api/ffi.h"

namespace flashjax {
namespace {

namespace ffi = ::xla::ffi;
using ffi::DataType;

// dense (K, M) in the weights' dtype, bit for bit, or converted to float32.
ffi::Error LscdUnpackCpu(ffi::ThreadPool pool, ffi::AnyBuffer bitmap, ffi::AnyBuffer entries,
                         ffi::AnyBuffer values, ffi::RemainingArgs layer,
                         ffi::Result<ffi::AnyBuffer> dense, int64_t weight_dtype) {
  constexpr const char* kOp = "flashjax_lscd_unpack_cpu";
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "result", *dense, {-1, -1}));
  const int64_t k = dense->dimensions()[0], m = dense->dimensions()[1];
  LscdMatrix w;
  FLASHJAX_RETURN_IF_ERROR(
      DecodeMatrix(kOp, k, m, bitmap, entries, values, weight_dtype, layer, &w));
  const DataType weight = w.type == HalfType::kFloat16 ? DataType::F16 : DataType::BF16;
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "result", *dense, {weight, DataType::F32}));
  try {
    LscdUnpack(w, dense->element_type() == DataType::F32, dense->untyped_data(), PoolThreads(pool));
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(kOp) + ": out of memory");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace flashjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxLscdUnpackCpu, flashjax::LscdUnpackCpu,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // bitmap
                                  .Arg<xla::ffi::AnyBuffer>()  // entries
                                  .Arg<xla::ffi::AnyBuffer>()  // values
                                  .RemainingArgs()             // layer
                                  .Ret<xla::ffi::AnyBuffer>()  // dense
                                  .Attr<int64_t>("weight_dtype"));
