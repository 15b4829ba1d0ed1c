#ifndef FLASHJAX_TESTS_EMULATION_CUDA_BF16_H_
#define FLASHJAX_TESTS_EMULATION_CUDA_BF16_H_

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (std::isnan(v)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#endif  // FLASHJAX_TESTS_EMULATION_CUDA_BF16_H_
