// Helpers of the kernels; part of simd_kernels-inc.h.
#ifndef FLASHJAX_CPU_SIMD_COMMON_INC_H_
#define FLASHJAX_CPU_SIMD_COMMON_INC_H_

namespace flashjax {
namespace {

// Bits 0..7 of each half of x to its even bits, bits 8..15 to its odd bits: from a bitmap word to
// two masks in the order of the positions. (The outer perfect shuffle of Hacker's Delight, 7-2.)
FLASHJAX_INLINE uint32_t ToPositionOrder(uint32_t x) {
  uint32_t t = (x ^ (x >> 4)) & 0x00F000F0u;
  x ^= t ^ (t << 4);
  t = (x ^ (x >> 2)) & 0x0C0C0C0Cu;
  x ^= t ^ (t << 2);
  t = (x ^ (x >> 1)) & 0x22222222u;
  return x ^ t ^ (t << 1);
}

// Its inverse.
FLASHJAX_INLINE uint32_t ToBitmapOrder(uint32_t x) {
  uint32_t t = (x ^ (x >> 1)) & 0x22222222u;
  x ^= t ^ (t << 1);
  t = (x ^ (x >> 2)) & 0x0C0C0C0Cu;
  x ^= t ^ (t << 2);
  t = (x ^ (x >> 4)) & 0x00F000F0u;
  return x ^ t ^ (t << 4);
}

// The numbers of set bits of both halves of x.
FLASHJAX_INLINE uint32_t CountHalves(uint32_t x) {
  x -= (x >> 1) & 0x55555555u;
  x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
  x = (x + (x >> 4)) & 0x0F0F0F0Fu;
  return (x + (x >> 8)) & 0x001F001Fu;
}

#if FLASHJAX_SIMD >= 1

// Transposes the two 8x8 matrices in the 128-bit lanes of a[0..7].
FLASHJAX_INLINE void Transpose8x8Half(__m256i* a) {
  __m256i t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_unpacklo_epi32(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm256_unpackhi_epi32(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm256_unpacklo_epi32(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm256_unpackhi_epi32(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi64(u[i], u[i + 4]);
    a[2 * i + 1] = _mm256_unpackhi_epi64(u[i], u[i + 4]);
  }
}

FLASHJAX_INLINE __m256i Load2x128(const uint16_t* low, const uint16_t* high) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// Transposes a 8x8 matrix of 32-bit words.
FLASHJAX_INLINE void Transpose8x8Word(__m256i* a) {
  __m256i t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    a[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

#endif

#if FLASHJAX_SIMD >= 2

// A zero that the compiler takes for a variable. vexpand and vcompress wait for the register they
// write, also when they zero it (seen on AMD Zen 5, where it halves the speed); merging into a copy
// of this one, which costs nothing, they do not. Nor are they then fused with a load, which is
// microcode on AMD.
FLASHJAX_INLINE __m512i FreshZero() {
  __m512i zero = _mm512_setzero_si512();
  asm("" : "+v"(zero));
  return zero;
}

// Words of `in` to the places of the set bits of `mask`, zeros to the others.
FLASHJAX_INLINE __m512i ExpandWords(uint32_t mask, __m512i in) {
  return _mm512_mask_expand_epi32(FreshZero(), static_cast<__mmask16>(mask), in);
}

// The words of `in` in the places of the set bits, one after the other, then zeros.
FLASHJAX_INLINE __m512i CompressWords(uint32_t mask, __m512i in) {
  return _mm512_mask_compress_epi32(FreshZero(), static_cast<__mmask16>(mask), in);
}

// Transposes a 16x16 matrix of 32-bit words.
FLASHJAX_INLINE void Transpose16x16Word(__m512i* a) {
  __m512i t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  // u[4 i + j]: column j of each 128-bit lane, rows 4 i .. 4 i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even01 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xDD);
    const __m512i even23 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xDD);
    a[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    a[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    a[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xDD);
    a[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xDD);
  }
}

#endif

}  // namespace
}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_COMMON_INC_H_
