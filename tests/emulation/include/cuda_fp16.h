#ifndef FLASHJAX_TESTS_EMULATION_CUDA_FP16_H_
#define FLASHJAX_TESTS_EMULATION_CUDA_FP16_H_

#include <cstdint>
#include <cstring>

#include "simt.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  _Float16 f;
  std::memcpy(&f, &v, 2);
  return static_cast<float>(f);
}

struct __half2 {
  __half x, y;
};

inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

inline __half __float2half_rn(float v) {
  const _Float16 f = static_cast<_Float16>(v);
  __half half;
  std::memcpy(&half, &f, 2);
  return half;
}

#endif  // FLASHJAX_TESTS_EMULATION_CUDA_FP16_H_
