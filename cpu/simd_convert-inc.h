// Conversion of rows of values; part of simd_kernels-inc.h.
#ifndef FLASHJAX_CPU_SIMD_CONVERT_INC_H_
#define FLASHJAX_CPU_SIMD_CONVERT_INC_H_

#include "cpu/simd_common-inc.h"

namespace flashjax {
namespace {

FLASHJAX_INLINE float HalfToFloat(uint16_t h) {
  // Subnormals as integers: the caller may have denormals switched off.
  const uint32_t magnitude = h & 0x7FFF;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits = (magnitude << 13) + (magnitude >= 0x7C00 ? 0x70000000u : 0x38000000u);
  uint32_t subnormal_bits;
  std::memcpy(&subnormal_bits, &subnormal, 4);
  bits = (magnitude < 0x0400 ? subnormal_bits : bits) | static_cast<uint32_t>(h & 0x8000) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

FLASHJAX_INLINE float Bfloat16ToFloat(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Rounds to nearest even. The way through a float addition for subnormals is Fabian Giesen's
// (float_to_half_fast3_rtne); none of its floats is denormal.
FLASHJAX_INLINE uint16_t FloatToHalf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7FFFFFFF;
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  const float shifted = magnitude + 0.5f;
  uint32_t subnormal;
  std::memcpy(&subnormal, &shifted, 4);
  subnormal -= 0x3F000000;
  const uint32_t normal = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
  const uint32_t special = bits > 0x7F800000 ? 0x7E00 : 0x7C00;
  const uint32_t finite = bits < 0x38800000 ? subnormal : normal;
  return static_cast<uint16_t>(sign | (bits >= 0x47800000 ? special : finite));
}

FLASHJAX_INLINE uint16_t FloatToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16 | 0x40) : rounded);
}

FLASHJAX_INLINE void ToFloat(const uint16_t* in, HalfType type, int64_t size, float* out) {
  int64_t i = 0;
  if (type == HalfType::kBfloat16) {
    for (; i < size; ++i) out[i] = Bfloat16ToFloat(in[i]);
    return;
  }
#if FLASHJAX_SIMD >= 1
  for (; i + 8 <= size; i += 8) {
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
#endif
  for (; i < size; ++i) out[i] = HalfToFloat(in[i]);
}

// `count` of 16 floats.
FLASHJAX_INLINE void StoreRow(const float* in, FloatType type, int64_t count, void* out,
                              int64_t offset) {
  if (type == FloatType::kFloat32) {
    std::memcpy(static_cast<float*>(out) + offset, in, count * sizeof(float));
    return;
  }
  uint16_t half[kStripRows];
  if (type == FloatType::kBfloat16) {
    for (int i = 0; i < kStripRows; ++i) half[i] = FloatToBfloat16(in[i]);
  } else {
#if FLASHJAX_SIMD >= 1
    for (int i = 0; i < kStripRows; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
    }
#else
    for (int i = 0; i < kStripRows; ++i) half[i] = FloatToHalf(in[i]);
#endif
  }
  std::memcpy(static_cast<uint16_t*>(out) + offset, half, count * sizeof(uint16_t));
}

}  // namespace
}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_CONVERT_INC_H_
