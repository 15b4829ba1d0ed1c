// Packing; part of simd_kernels-inc.h.
#ifndef FLASHJAX_CPU_SIMD_PACK_INC_H_
#define FLASHJAX_CPU_SIMD_PACK_INC_H_

#include "cpu/simd_common-inc.h"

namespace flashjax {
namespace {

FLASHJAX_TARGET void LoadTile(const uint16_t* dense, int64_t stride, uint16_t* tile,
                              uint16_t* masks) {
  for (int t = 0; t < 4; ++t) {
#if FLASHJAX_SIMD >= 1
    for (int half = 0; half < 2; ++half) {
      __m256i a[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const uint16_t* row = dense + PositionColumn(t, i) * stride + 8 * half;
        a[i] = Load2x128(row, row + 32 * stride);
      }
      Transpose8x8Half(a);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int q = 4 * (8 * half + i) + t;
        __m256i* out = reinterpret_cast<__m256i*>(tile + q * kStreamPositions);
#if FLASHJAX_SIMD >= 2
        const __mmask16 mask = _mm256_test_epi16_mask(a[i], _mm256_set1_epi16(0x7FFF));
        masks[q] = mask;
        _mm256_storeu_si256(out, _mm256_maskz_mov_epi16(mask, a[i]));
#else
        const __m256i zero =
            _mm256_cmpeq_epi16(_mm256_add_epi16(a[i], a[i]), _mm256_setzero_si256());
        const __m128i bytes =
            _mm_packs_epi16(_mm256_castsi256_si128(zero), _mm256_extracti128_si256(zero, 1));
        masks[q] = static_cast<uint16_t>(~_mm_movemask_epi8(bytes));
        _mm256_storeu_si256(out, _mm256_andnot_si256(zero, a[i]));
#endif
      }
    }
#else
    // Local arrays, which the compiler knows to be apart, so that it can vectorize.
    uint16_t block[kStreamPositions][kStripRows], bits[kStripRows] = {};
    for (int i = 0; i < kStreamPositions; ++i) {
      const uint16_t* in = dense + PositionColumn(t, i) * stride;
      for (int row = 0; row < kStripRows; ++row) {
        const uint16_t present = (in[row] & 0x7FFF) != 0 ? 0xFFFF : 0;
        block[i][row] = in[row] & present;
        bits[row] |= present & (1 << i);
      }
    }
    for (int row = 0; row < kStripRows; ++row) {
      const int q = 4 * row + t;
      masks[q] = bits[row];
      for (int i = 0; i < kStreamPositions; ++i) tile[q * kStreamPositions + i] = block[i][row];
    }
#endif
  }
}

FLASHJAX_INLINE int CeilSegments(int64_t words) {
  return static_cast<int>((words + kSegmentWords - 1) / kSegmentWords);
}

FLASHJAX_TARGET int64_t PlanChain(uint16_t* masks, int64_t total, int64_t strip_steps, int spread,
                                  uint32_t* bitmap, uint32_t* entries, uint32_t* counts) {
  const int64_t strip_entries = CeilDiv(strip_steps, kEntrySteps);
  int32_t n[kStreams] = {}, count[kStreams] = {}, next_count[kStreams] = {};
  const auto count_step = masks;  // of the first step
  for (int q = 0; q < kStreams; ++q) count[q] = CountHalves(count_step[q]);
  int32_t lowest = 0, resident = 0;
  uint32_t* entry = nullptr;
  for (int64_t u = 0; u < total; ++u, masks += kStreams) {
    const int64_t strip = u / strip_steps, step = u % strip_steps;
    if (step == 0) counts[strip] = 0;
    if (step % kEntrySteps == 0) {
      entry = entries + (strip * strip_entries + step / kEntrySteps) * kEntryWords;
      const int32_t base = lowest / kSegmentWords;
      entry[0] = base;
      entry[1] = resident - base;
      uint8_t offsets[kStreams];
      for (int q = 0; q < kStreams; ++q) {
        offsets[q] = static_cast<uint8_t>(n[q] - base * kSegmentWords);
      }
      for (int w = 0; w < kStreams / 4; ++w) {
        entry[2 + w] = offsets[4 * w] | offsets[4 * w + 1] << 8 | offsets[4 * w + 2] << 16 |
                       static_cast<uint32_t>(offsets[4 * w + 3]) << 24;
      }
    }
    if (u + 1 < total) {
      for (int q = 0; q < kStreams; ++q) next_count[q] = CountHalves(masks[kStreams + q]);
    } else {
      for (int q = 0; q < kStreams; ++q) next_count[q] = 0;
    }
    int32_t peak = 0, nonzeros = 0;
    lowest = INT32_MAX;
    for (int q = 0; q < kStreams; ++q) {
      nonzeros += count[q];
      n[q] += count[q];
      lowest = std::min(lowest, n[q]);
      peak = std::max(peak, n[q] + next_count[q]);
    }
    counts[strip] += nonzeros;
    const int32_t bound = kSegmentWords * (CeilSegments(peak) - spread);
    if (lowest < bound) {
      lowest = bound;
      for (int q = 0; q < kStreams; ++q) {
        for (; n[q] < bound; ++n[q]) masks[q] |= masks[q] + 1;
      }
    }
    int32_t highest = 0;
    for (int q = 0; q < kStreams; ++q) highest = std::max(highest, n[q]);
    if (CeilSegments(highest) > resident) {
      ++resident;
      entry[1] |= uint32_t{1} << (16 + step % kEntrySteps);
    }
    uint32_t words[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      words[lane] = ToBitmapOrder(masks[lane] | static_cast<uint32_t>(masks[kLanes + lane]) << 16);
    }
    uint32_t* out = bitmap + u / kGroupSteps * kLanes * kGroupSteps + u % kGroupSteps;
    for (int lane = 0; lane < kLanes; ++lane) out[lane * kGroupSteps] = words[lane];
    std::memcpy(count, next_count, sizeof(count));
  }
  return resident;
}

// Appends the marked positions of a stream's step to `out`; may write 16 words.
FLASHJAX_INLINE void Compress(const uint16_t* in, uint32_t mask, uint16_t* out) {
#if FLASHJAX_SIMD >= 2
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtepi32_epi16(CompressWords(mask, wide)));
#elif FLASHJAX_SIMD >= 1
  for (int half = 0; half < 2; ++half) {
    const uint32_t bits = mask >> 8 * half & 0xFF;
    // Bytes 2 p, 2 p + 1 for each set bit p, from the nibbles p of its compressed positions.
    const uint64_t nibbles = _pext_u64(0x76543210u, _pdep_u64(bits, 0x11111111u) * 0xF);
    const __m128i index =
        _mm_cvtepu8_epi16(_mm_cvtsi64_si128(_pdep_u64(nibbles, 0x0F0F0F0F0F0F0F0Full)));
    const __m128i bytes =
        _mm_add_epi8(_mm_mullo_epi16(index, _mm_set1_epi16(0x0202)), _mm_set1_epi16(0x0100));
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 8 * half));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(values, bytes));
    out += _mm_popcnt_u32(bits);
  }
#else
  for (; mask != 0; mask &= mask - 1) *out++ = in[__builtin_ctz(mask)];
#endif
}

// A segment from linear streams, `stride` apart.
FLASHJAX_INLINE void StoreSegment(const uint16_t* streams, int64_t stride, uint32_t* segment) {
#if FLASHJAX_SIMD >= 2
  for (int first = 0; first < kLanes; first += 16) {
    __m512i a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const uint16_t* low = streams + (first + i) * stride;
      const uint16_t* high = low + kLanes * stride;
      a[i] = _mm512_or_si512(
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low))),
          _mm512_slli_epi32(
              _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high))),
              16));
    }
    Transpose16x16Word(a);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(segment + i * kLanes + first, a[i]);
  }
#elif FLASHJAX_SIMD >= 1
  for (int word = 0; word < kSegmentWords; word += 8) {
    for (int first = 0; first < kLanes; first += 8) {
      __m256i a[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const uint16_t* low = streams + (first + i) * stride + word;
        const uint16_t* high = low + kLanes * stride;
        a[i] = _mm256_or_si256(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
            _mm256_slli_epi32(
                _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high))),
                16));
      }
      Transpose8x8Word(a);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(segment + (word + i) * kLanes + first),
                            a[i]);
      }
    }
  }
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint16_t* low = streams + lane * stride;
    const uint16_t* high = low + kLanes * stride;
    for (int word = 0; word < kSegmentWords; ++word) {
      segment[word * kLanes + lane] = low[word] | static_cast<uint32_t>(high[word]) << 16;
    }
  }
#endif
}

FLASHJAX_TARGET void FillChain(const TileSource& next, int64_t total, const uint32_t* bitmap,
                               int64_t segments, uint32_t* values) {
  // Streams are at most kRingSegments segments apart, and a group adds at most 64 words.
  constexpr int kWords = 16 * kSegmentWords, kStride = kWords + kStreamPositions;
  constexpr int kGroupWords = kGroupSteps * kStreamPositions;
  uint16_t streams[kStreams * kStride];
  int32_t n[kStreams] = {};  // words in `streams`
  const uint16_t* tiles = nullptr;
  int64_t given = 0;  // steps of tiles
  for (int64_t u = 0; u < total; u += kGroupSteps, bitmap += kLanes * kGroupSteps) {
    if (u == given) given += next(&tiles);
    for (int j = 0; j < kGroupSteps; ++j, tiles += kStreams * kStreamPositions) {
      uint16_t masks[kStreams];
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t both = ToPositionOrder(bitmap[lane * kGroupSteps + j]);
        masks[lane] = static_cast<uint16_t>(both);
        masks[kLanes + lane] = static_cast<uint16_t>(both >> 16);
      }
      for (int q = 0; q < kStreams; ++q) {
        Compress(tiles + q * kStreamPositions, masks[q], streams + q * kStride + n[q]);
        n[q] += CountHalves(masks[q]);
      }
    }
    int32_t lowest = n[0], highest = n[0];
    for (int q = 1; q < kStreams; ++q) {
      lowest = std::min(lowest, n[q]);
      highest = std::max(highest, n[q]);
    }
    if (highest <= kWords - kGroupWords) continue;
    const int done = lowest / kSegmentWords;
    for (int s = 0; s < done; ++s, values += kSegmentWords * kLanes) {
      StoreSegment(streams + s * kSegmentWords, kStride, values);
    }
    segments -= done;
    for (int q = 0; q < kStreams; ++q) {
      uint16_t* stream = streams + q * kStride;
      n[q] -= done * kSegmentWords;
      std::memmove(stream, stream + done * kSegmentWords, n[q] * sizeof(uint16_t));
    }
  }
  for (int q = 0; q < kStreams; ++q) {
    std::fill(streams + q * kStride + n[q], streams + (q + 1) * kStride, uint16_t{0});
  }
  for (int64_t s = 0; s < segments; ++s, values += kSegmentWords * kLanes) {
    StoreSegment(streams + s * kSegmentWords, kStride, values);
  }
}

}  // namespace
}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_PACK_INC_H_
