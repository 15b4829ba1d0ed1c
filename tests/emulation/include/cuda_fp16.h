#ifndef FLASHJAX_TESTS_EMULATION_CUDA_FP16_H_
#define FLASHJAX_TESTS_EMULATION_CUDA_FP16_H_

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  _Float16 f;
  std::memcpy(&f, &v, 2);
  return static_cast<float>(f);
}

inline __half __float2half_rn(float v) {
  const _Float16 f = static_cast<_Float16>(v);
  __half half;
  std::memcpy(&half, &f, 2);
  return half;
}

#endif  // FLASHJAX_TESTS_EMULATION_CUDA_FP16_H_
