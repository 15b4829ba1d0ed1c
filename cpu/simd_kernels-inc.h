// The kernels of one instruction set. The including file defines
//   FLASHJAX_TARGET   the attribute that switches the set on
//   FLASHJAX_SIMD     0 portable, 1 AVX2, 2 AVX-512
//   FLASHJAX_KERNELS  the table to define
// Loops that the compiler vectorizes well stay plain C++ for all of them.
#ifndef FLASHJAX_CPU_SIMD_KERNELS_INC_H_
#define FLASHJAX_CPU_SIMD_KERNELS_INC_H_

#define FLASHJAX_INLINE inline __attribute__((always_inline)) FLASHJAX_TARGET

#include "cpu/simd_matmul-inc.h"
#include "cpu/simd_pack-inc.h"
#include "cpu/simd_transposed-inc.h"
#include "cpu/simd_unpack-inc.h"

namespace flashjax {

const LscdKernels FLASHJAX_KERNELS = {LoadTile, PlanChain,    FillChain, UnpackStrips,
                                      PermuteX, MatmulStrips, AddStrips, StoreSums};

}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_KERNELS_INC_H_
