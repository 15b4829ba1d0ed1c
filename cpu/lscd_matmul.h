// Products with a packed matrix, and unpacking, on the CPU.
#ifndef FLASHJAX_CPU_LSCD_MATMUL_H_
#define FLASHJAX_CPU_LSCD_MATMUL_H_

#include <cstdint>

#include "cpu/lscd_layout.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace flashjax {

// y (n, M) = x (n, K) W^T + bias with float32 accumulation; bias may be null. Every row's sum is
// taken in one order that depends on the instruction set alone. May throw std::bad_alloc.
void LscdMatmul(const LscdMatrix& w, const void* x, FloatType x_type, int64_t n, const float* bias,
                void* y, FloatType y_type, const ParallelFor& parallel_for);

// dx (n, K) = dy (n, M) W, with float32 accumulation in one order that depends on the shape and the
// instruction set alone. May throw std::bad_alloc.
void LscdMatmulTransposed(const LscdMatrix& w, const void* dy, FloatType dy_type, int64_t n,
                          void* dx, FloatType dx_type, const ParallelFor& parallel_for);

// dense (K, M): the 16-bit patterns, or floats.
void LscdUnpack(const LscdMatrix& w, bool to_float, void* dense, const ParallelFor& parallel_for);

}  // namespace flashjax

#endif  // FLASHJAX_CPU_LSCD_MATMUL_H_
