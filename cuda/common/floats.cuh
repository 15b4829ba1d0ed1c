// Half precision and float8 (e4m3fn) from and to float32.
#ifndef FLASHJAX_CUDA_COMMON_FLOATS_CUH_
#define FLASHJAX_CUDA_COMMON_FLOATS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashjax {

struct Float8 {
  uint8_t bits;
};

template <typename T>
__device__ __forceinline__ float2 ToFloat2(uint32_t pair);
template <>
__device__ __forceinline__ float2 ToFloat2<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 ToFloat2<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 ToFloat2<Float8>(uint32_t pair) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  return ToFloat2<__half>(halves);
#else
  // As float16 the bits mean 2^-8 of the value, and NaN would be finite.
  const uint32_t low = pair & 0xffu, high = (pair >> 8) & 0xffu;
  const auto half = [](uint32_t v) {
    return (v & 0x80u) << 8 | ((v & 0x7fu) == 0x7fu ? 0x7fffu : (v & 0x7fu) << 7);
  };
  const float2 v = ToFloat2<__half>(half(low) | half(high) << 16);
  return {v.x * 256.0f, v.y * 256.0f};
#endif
}

// The 4 / sizeof(T) values of a word.
template <typename T>
__device__ __forceinline__ void ToFloats(uint32_t word, float* values) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(2 / sizeof(T)); ++i) {
    const float2 pair = ToFloat2<T>(word >> (16 * i));
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// Those of 16 bytes.
template <typename T>
__device__ __forceinline__ void ToFloats(const uint4& words, float* values) {
  constexpr int kCount = 4 / sizeof(T);
  ToFloats<T>(words.x, values);
  ToFloats<T>(words.y, values + kCount);
  ToFloats<T>(words.z, values + 2 * kCount);
  ToFloats<T>(words.w, values + 3 * kCount);
}

template <typename T>
__device__ __forceinline__ T FromFloat(float v);
template <>
__device__ __forceinline__ __half FromFloat<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_FLOATS_CUH_
