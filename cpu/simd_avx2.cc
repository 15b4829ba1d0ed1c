#if defined(__x86_64__)
// GCC 12 warns about its own _mm512_undefined_epi32() (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu/lscd_layout.h"
#include "cpu/simd.h"

// An attribute on each function rather than a compiler flag, so that no inline function of the
// standard library is compiled for this set and then picked by the linker for every machine.
#define FLASHJAX_TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
#define FLASHJAX_SIMD 1
#define FLASHJAX_KERNELS kAvx2Kernels
#include "cpu/simd_kernels-inc.h"
#endif  // __x86_64__
