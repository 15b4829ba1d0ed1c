// Unpacking; part of simd_kernels-inc.h.
#ifndef FLASHJAX_CPU_SIMD_UNPACK_INC_H_
#define FLASHJAX_CPU_SIMD_UNPACK_INC_H_

#include "cpu/simd_stream-inc.h"

namespace flashjax {
namespace {

// A stream's 16 positions of a step, zeros where the mask is clear.
FLASHJAX_INLINE void ExpandBits(const uint16_t* in, uint32_t mask, uint16_t* out) {
#if FLASHJAX_SIMD >= 2
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  _mm256_store_si256(reinterpret_cast<__m256i*>(out),
                     _mm512_cvtepi32_epi16(ExpandWords(mask, wide)));
#elif FLASHJAX_SIMD >= 1
  for (int half = 0; half < 2; ++half) {
    const uint32_t bits = mask >> 8 * half & 0xFF;
    const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kRanks.ranks[bits]));
    // Byte pairs (2 rank, 2 rank + 1); a clear bit's -128 becomes (-128, -127), which gives zeros.
    const __m128i pairs = _mm_unpacklo_epi8(ranks, ranks);
    const __m128i twice = _mm_add_epi8(pairs, _mm_andnot_si128(_mm_srai_epi16(pairs, 15), pairs));
    const __m128i index = _mm_add_epi8(twice, _mm_set1_epi16(0x0100));
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
    _mm_store_si128(reinterpret_cast<__m128i*>(out + 8 * half), _mm_shuffle_epi8(values, index));
    in += _mm_popcnt_u32(bits);
  }
#else
  std::fill(out, out + kStreamPositions, uint16_t{0});
  for (; mask != 0; mask &= mask - 1) out[__builtin_ctz(mask)] = *in++;
#endif
}

// Step j of the ring's group: 64 rows (k) of 16 values, `stride` apart.
FLASHJAX_INLINE void UnpackStep(const Ring* ring, int j, uint16_t* rows, int64_t stride) {
  for (int t = 0; t < 4; ++t) {
    alignas(32) uint16_t block[kStripRows][kStreamPositions];
    for (int row = 0; row < kStripRows; ++row) {
      const int i = Ring::Index(row % 8, t, j) + row / 8;
      ExpandBits(ring->streams + ring->starts[i], ring->masks[i], block[row]);
    }
#if FLASHJAX_SIMD >= 1
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row) {
      a[row] = _mm256_load_si256(reinterpret_cast<const __m256i*>(block[row]));
      b[row] = _mm256_load_si256(reinterpret_cast<const __m256i*>(block[8 + row]));
    }
    Transpose8x8Half(a);
    Transpose8x8Half(b);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      uint16_t* out = rows + PositionColumn(t, i) * stride;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                          _mm256_permute2x128_si256(a[i], b[i], 0x20));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * stride),
                          _mm256_permute2x128_si256(a[i], b[i], 0x31));
    }
#else
    for (int i = 0; i < kStreamPositions; ++i) {
      uint16_t* out = rows + PositionColumn(t, i) * stride;
      for (int row = 0; row < kStripRows; ++row) out[row] = block[row][i];
    }
#endif
  }
}

FLASHJAX_TARGET void UnpackStrips(const LscdMatrix& w, int64_t first, int64_t strips, bool to_float,
                                  void* dense) {
  constexpr int kColumns = kUnpackStrips * kStripRows;
  const LscdShape& shape = w.shape;
  const int64_t groups = shape.groups(), entries_words = shape.entries() * kEntryWords;
  std::unique_ptr<Ring[]> rings(new Ring[kUnpackStrips]);
  for (int64_t begin = first; begin < first + strips; begin += kUnpackStrips) {
    const int64_t count = std::min<int64_t>(kUnpackStrips, first + strips - begin);
    const int64_t column = begin * kStripRows;
    const int64_t columns = std::min<int64_t>(count * kStripRows, shape.m - column);
    for (int64_t i = 0; i < count; ++i) {
      StartStrip(&rings[i], w.entries + (begin + i) * entries_words);
    }
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t strip = begin + i;
        NextGroup(&rings[i], w.bitmap + strip * groups * kLanes * kGroupSteps,
                  w.entries + strip * entries_words, w.values, w.segments, group);
      }
      for (int j = 0; j < kGroupSteps; ++j) {
        alignas(64) uint16_t rows[kStepK][kColumns];
        const int64_t k = (group * kGroupSteps + j) * kStepK;
        const int64_t height = std::min<int64_t>(kStepK, shape.k - k);
        if (height <= 0) break;
        for (int64_t i = 0; i < count; ++i) {
          UnpackStep(&rings[i], j, rows[0] + i * kStripRows, kColumns);
        }
        for (int64_t row = 0; row < height; ++row) {
          const int64_t out = (k + row) * shape.m + column;
          if (!to_float) {
            std::memcpy(static_cast<uint16_t*>(dense) + out, rows[row], columns * sizeof(uint16_t));
          } else {
            ToFloat(rows[row], w.type, columns, static_cast<float*>(dense) + out);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_UNPACK_INC_H_
