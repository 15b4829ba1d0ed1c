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

// y (N, M) = x (N, K) W^T + bias; bias (M,) float32, or (0,) for none.
ffi::Error LscdMatmulCpu(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer bitmap,
                         ffi::AnyBuffer entries, ffi::AnyBuffer values, ffi::AnyBuffer bias,
                         ffi::RemainingArgs layer, ffi::Result<ffi::AnyBuffer> y,
                         int64_t weight_dtype) {
  constexpr const char* kOp = "flashjax_lscd_matmul_cpu";
  const auto floats = {DataType::F16, DataType::BF16, DataType::F32};
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "x", x, floats));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "x", x, {-1, -1}));
  const int64_t n = x.dimensions()[0], k = x.dimensions()[1];
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "result", *y, floats));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "result", *y, {n, -1}));
  const int64_t m = y->dimensions()[1];
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "bias", bias, {DataType::F32}));
  const bool has_bias = bias.element_count() != 0;
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "bias", bias, {has_bias ? m : 0}));
  LscdMatrix w;
  FLASHJAX_RETURN_IF_ERROR(
      DecodeMatrix(kOp, k, m, bitmap, entries, values, weight_dtype, layer, &w));
  try {
    LscdMatmul(w, x.untyped_data(), ToFloatType(x.element_type()), n,
               has_bias ? static_cast<const float*>(bias.untyped_data()) : nullptr,
               y->untyped_data(), ToFloatType(y->element_type()), PoolThreads(pool));
  } catch (const std::bad_alloc&) {
    return ffi::Error(
        ffi::ErrorCode::kResourceExhausted,
        std::string(kOp) + ": out of memory for x as float32 " + ShapeText(x.dimensions()));
  }
  return ffi::Error::Success();
}

// dx (N, K) = dy (N, M) W.
ffi::Error LscdMatmulTransposedCpu(ffi::ThreadPool pool, ffi::AnyBuffer dy, ffi::AnyBuffer bitmap,
                                   ffi::AnyBuffer entries, ffi::AnyBuffer values,
                                   ffi::RemainingArgs layer, ffi::Result<ffi::AnyBuffer> dx,
                                   int64_t weight_dtype) {
  constexpr const char* kOp = "flashjax_lscd_matmul_transposed_cpu";
  const auto floats = {DataType::F16, DataType::BF16, DataType::F32};
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "dy", dy, floats));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "dy", dy, {-1, -1}));
  const int64_t n = dy.dimensions()[0], m = dy.dimensions()[1];
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(kOp, "result", *dx, floats));
  FLASHJAX_RETURN_IF_ERROR(CheckShape(kOp, "result", *dx, {n, -1}));
  const int64_t k = dx->dimensions()[1];
  if (m == 0 && dx->element_count() != 0) return Mismatch(kOp, "dy", "columns", "none");
  LscdMatrix w;
  FLASHJAX_RETURN_IF_ERROR(
      DecodeMatrix(kOp, k, m, bitmap, entries, values, weight_dtype, layer, &w));
  try {
    LscdMatmulTransposed(w, dy.untyped_data(), ToFloatType(dy.element_type()), n,
                         dx->untyped_data(), ToFloatType(dx->element_type()), PoolThreads(pool));
  } catch (const std::bad_alloc&) {
    return ffi::Error(
        ffi::ErrorCode::kResourceExhausted,
        std::string(kOp) + ": out of memory for the sums of " + ShapeText(dx->dimensions()));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace flashjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxLscdMatmulCpu, flashjax::LscdMatmulCpu,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // bitmap
                                  .Arg<xla::ffi::AnyBuffer>()  // entries
                                  .Arg<xla::ffi::AnyBuffer>()  // values
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .RemainingArgs()             // layer
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Attr<int64_t>("weight_dtype"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxLscdMatmulTransposedCpu, flashjax::LscdMatmulTransposedCpu,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // dy
                                  .Arg<xla::ffi::AnyBuffer>()  // bitmap
                                  .Arg<xla::ffi::AnyBuffer>()  // entries
                                  .Arg<xla::ffi::AnyBuffer>()  // values
                                  .RemainingArgs()             // layer
                                  .Ret<xla::ffi::AnyBuffer>()  // dx
                                  .Attr<int64_t>("weight_dtype"));
