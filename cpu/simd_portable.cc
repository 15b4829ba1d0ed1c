#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu/lscd_layout.h"
#include "cpu/simd.h"

#define FLASHJAX_TARGET
#define FLASHJAX_SIMD 0
#define FLASHJAX_KERNELS kPortableKernels
#include "cpu/simd_kernels-inc.h"
