// Walking along the streams of a strip; part of simd_kernels-inc.h.
#ifndef FLASHJAX_CPU_SIMD_STREAM_INC_H_
#define FLASHJAX_CPU_SIMD_STREAM_INC_H_

#include "cpu/simd_common-inc.h"
#include "cpu/simd_convert-inc.h"

namespace flashjax {
namespace {

// The window of a strip's streams: the segments of a lane's words become one linear array a stream.
// A group needs at most 4 segments behind the first one that it adds and 3 more, so 8 slots do. The
// first slot is repeated after the last: a step's values are then contiguous wherever they start.
struct Ring {
  static constexpr int kSlots = 8, kWords = kSlots * kSegmentWords;
  static constexpr int kStride = kWords + kSegmentWords;

  alignas(64) uint16_t streams[kStreams * kStride];
  // Of the current group, [32 lanes][4 steps][2 streams] like the bitmap: which positions are
  // stored (bit i: position i) and where in `streams` the step starts.
  alignas(64) uint16_t masks[kStreams * kGroupSteps];
  alignas(64) uint16_t starts[kStreams * kGroupSteps];
  alignas(
      64) uint16_t next[kStreams];  // [32 lanes][2 streams] start of the next group in the stream
  int64_t resident = 0;             // segments (from 0) that the steps so far need
  int64_t end = 0;                  // the slots hold segments end - kSlots .. end - 1

  // Of step j of rows g (stream 0) and, one further, g + 8 (stream 1); 32 further are g + 1's.
  static constexpr int Index(int g, int t, int j) { return ((4 * g + t) * kGroupSteps + j) * 2; }
};

#if FLASHJAX_SIMD == 1
// For each byte of a mask: the rank of bit p among its set bits, -128 where bit p is clear.
struct RankTable {
  alignas(64) int8_t ranks[256][8] = {};
  constexpr RankTable() {
    for (int mask = 0; mask < 256; ++mask) {
      int rank = 0;
      for (int p = 0; p < 8; ++p) ranks[mask][p] = mask >> p & 1 ? rank++ : -128;
    }
  }
};
constexpr RankTable kRanks;
#endif

// Spreads a segment over the streams, Ring::kStride apart; `streams` points into the first one.
FLASHJAX_INLINE void LoadSegment(const uint32_t* segment, uint16_t* streams) {
  constexpr int kStride = Ring::kStride;
#if FLASHJAX_SIMD >= 2
  // The 256-bit halves that one lane has in two registers, of the first two lanes and the others.
  const __m512i low_lanes = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high_lanes = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int first = 0; first < kLanes; first += 16) {
    // Two words of each stream next to each other, for stream 0 and for stream 1.
    __m512i pairs[2][8], t[8], u[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i a = _mm512_loadu_si512(segment + 2 * i * kLanes + first);
      const __m512i b = _mm512_loadu_si512(segment + (2 * i + 1) * kLanes + first);
      pairs[0][i] = _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16));
      pairs[1][i] = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(a, 16), b);
    }
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(pairs[s][2 * i], pairs[s][2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(pairs[s][2 * i], pairs[s][2 * i + 1]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i low = _mm512_permutex2var_epi64(u[i], low_lanes, u[4 + i]);
        const __m512i high = _mm512_permutex2var_epi64(u[i], high_lanes, u[4 + i]);
        __m256i* out[4];
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
          out[l] = reinterpret_cast<__m256i*>(streams + (kLanes * s + first + 4 * l + i) * kStride);
        }
        _mm256_storeu_si256(out[0], _mm512_castsi512_si256(low));
        _mm256_storeu_si256(out[1], _mm512_extracti64x4_epi64(low, 1));
        _mm256_storeu_si256(out[2], _mm512_castsi512_si256(high));
        _mm256_storeu_si256(out[3], _mm512_extracti64x4_epi64(high, 1));
      }
    }
  }
#elif FLASHJAX_SIMD >= 1
  for (int first = 0; first < kLanes; first += 8) {
    for (int word = 0; word < kSegmentWords; word += 8) {
      __m256i a[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        a[i] = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(segment + (word + i) * kLanes + first));
      }
      Transpose8x8Word(a);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m256i low_words = _mm256_and_si256(a[i], _mm256_set1_epi32(0xFFFF));
        const __m256i high_words = _mm256_srli_epi32(a[i], 16);
        const __m256i both =
            _mm256_permute4x64_epi64(_mm256_packus_epi32(low_words, high_words), 0xD8);
        uint16_t* low = streams + (first + i) * kStride + word;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(both));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low + kLanes * kStride),
                         _mm256_extracti128_si256(both, 1));
      }
    }
  }
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    uint16_t* low = streams + lane * kStride;
    uint16_t* high = low + kLanes * kStride;
    for (int word = 0; word < kSegmentWords; ++word) {
      low[word] = static_cast<uint16_t>(segment[word * kLanes + lane]);
      high[word] = static_cast<uint16_t>(segment[word * kLanes + lane] >> 16);
    }
  }
#endif
}

// Goes to the start of a strip. Segments that the strip before it has left in the ring stay.
FLASHJAX_INLINE void StartStrip(Ring* ring, const uint32_t* entry) {
  constexpr int kSlots = Ring::kSlots;
  const int64_t base = entry[0];
  ring->resident = base + std::min<int64_t>(entry[1] & 0xFFFF, kSlots);
  if (base < ring->end - kSlots || base > ring->end) ring->end = base;
  uint8_t offsets[kStreams];
  std::memcpy(offsets, entry + 2, sizeof(offsets));
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int s = 0; s < 2; ++s) {
      ring->next[2 * lane + s] =
          static_cast<uint16_t>(base * kSegmentWords + offsets[kLanes * s + lane]);
    }
  }
}

#if FLASHJAX_SIMD >= 2
// One round of ToPositionOrder.
template <int kShift, int kBits>
FLASHJAX_INLINE __m512i SwapBits(__m512i x) {
  const __m512i t =
      _mm512_and_si512(_mm512_xor_si512(x, _mm512_srli_epi32(x, kShift)), _mm512_set1_epi16(kBits));
  return _mm512_xor_si512(x, _mm512_xor_si512(t, _mm512_slli_epi32(t, kShift)));
}
#elif FLASHJAX_SIMD >= 1
// One round of ToPositionOrder.
template <int kShift, int kBits>
FLASHJAX_INLINE __m256i SwapBits(__m256i x) {
  const __m256i t =
      _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, kShift)), _mm256_set1_epi16(kBits));
  return _mm256_xor_si256(x, _mm256_xor_si256(t, _mm256_slli_epi32(t, kShift)));
}
#endif

// Masks and starts of a group's steps, from its part of the bitmap.
FLASHJAX_INLINE void ReadMasks(Ring* ring, const uint32_t* bitmap) {
  constexpr int kWrap = Ring::kWords - 1, kStride = Ring::kStride;
#if FLASHJAX_SIMD >= 2
  const __m512i nibble = _mm512_set1_epi8(0x0F);
  const __m512i counts =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i gather = _mm512_setr_epi32(3, 7, 11, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  // Where the streams of lanes 0 .. 3 begin.
  __m512i stream = _mm512_mullo_epi32(spread, _mm512_set1_epi32(kStride << 16 | kStride));
  stream = _mm512_add_epi32(stream, _mm512_set1_epi32(kLanes * kStride << 16));
  for (int i = 0; i < kStreams * kGroupSteps; i += 32) {
    __m512i x = _mm512_loadu_si512(bitmap + i / 2);
    x = SwapBits<4, 0x00F0>(x);
    x = SwapBits<2, 0x0C0C>(x);
    x = SwapBits<1, 0x2222>(x);
    _mm512_store_si512(ring->masks + i, x);
    const __m512i bytes = _mm512_add_epi8(
        _mm512_shuffle_epi8(counts, _mm512_and_si512(x, nibble)),
        _mm512_shuffle_epi8(counts, _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble)));
    const __m512i count = _mm512_maddubs_epi16(bytes, _mm512_set1_epi8(1));
    __m512i sum = _mm512_add_epi16(count, _mm512_bslli_epi128(count, 4));
    sum = _mm512_add_epi16(sum, _mm512_bslli_epi128(sum, 8));
    __m128i* next = reinterpret_cast<__m128i*>(ring->next + i / 4);
    const __m128i old = _mm_load_si128(next);
    const __m512i start =
        _mm512_add_epi16(_mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(old)),
                         _mm512_sub_epi16(sum, count));
    _mm512_store_si512(ring->starts + i,
                       _mm512_add_epi16(_mm512_and_si512(start, _mm512_set1_epi16(kWrap)), stream));
    stream = _mm512_add_epi16(stream, _mm512_set1_epi16(4 * kStride));
    _mm_store_si128(
        next, _mm_add_epi16(old, _mm512_castsi512_si128(_mm512_permutexvar_epi32(gather, sum))));
  }
#elif FLASHJAX_SIMD >= 1
  const __m256i nibble = _mm256_set1_epi8(0x0F);
  const __m256i counts =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  const __m256i gather = _mm256_setr_epi32(3, 7, 0, 0, 0, 0, 0, 0);
  // Where the streams of lanes 0 and 1 begin.
  __m256i stream = _mm256_mullo_epi32(spread, _mm256_set1_epi32(kStride << 16 | kStride));
  stream = _mm256_add_epi32(stream, _mm256_set1_epi32(kLanes * kStride << 16));
  for (int i = 0; i < kStreams * kGroupSteps; i += 16) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bitmap + i / 2));
    x = SwapBits<4, 0x00F0>(x);
    x = SwapBits<2, 0x0C0C>(x);
    x = SwapBits<1, 0x2222>(x);
    _mm256_store_si256(reinterpret_cast<__m256i*>(ring->masks + i), x);
    const __m256i bytes = _mm256_add_epi8(
        _mm256_shuffle_epi8(counts, _mm256_and_si256(x, nibble)),
        _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble)));
    const __m256i count = _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
    __m256i sum = _mm256_add_epi16(count, _mm256_bslli_epi128(count, 4));
    sum = _mm256_add_epi16(sum, _mm256_bslli_epi128(sum, 8));
    __m128i* next = reinterpret_cast<__m128i*>(ring->next + i / 4);
    const __m128i old = _mm_loadl_epi64(next);
    const __m256i start =
        _mm256_add_epi16(_mm256_permutevar8x32_epi32(_mm256_castsi128_si256(old), spread),
                         _mm256_sub_epi16(sum, count));
    _mm256_store_si256(reinterpret_cast<__m256i*>(ring->starts + i),
                       _mm256_add_epi16(_mm256_and_si256(start, _mm256_set1_epi16(kWrap)), stream));
    stream = _mm256_add_epi16(stream, _mm256_set1_epi16(2 * kStride));
    _mm_storel_epi64(
        next, _mm_add_epi16(old, _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(sum, gather))));
  }
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int j = 0; j < kGroupSteps; ++j) {
      const uint32_t mask = ToPositionOrder(bitmap[lane * kGroupSteps + j]);
      const uint32_t count = CountHalves(mask);
      for (int s = 0; s < 2; ++s) {
        const int i = (lane * kGroupSteps + j) * 2 + s;
        ring->masks[i] = static_cast<uint16_t>(mask >> 16 * s);
        ring->starts[i] = (kLanes * s + lane) * kStride + (ring->next[2 * lane + s] & kWrap);
        ring->next[2 * lane + s] += static_cast<uint16_t>(count >> 16 * s & 0x1F);
      }
    }
  }
#endif
}

// Goes to a group of the strip: its masks and starts, and the segments that it needs. Segments that
// do not exist (in arrays that no packer made) are not read.
FLASHJAX_INLINE void NextGroup(Ring* ring, const uint32_t* bitmap, const uint32_t* entries,
                               const uint32_t* values, int64_t segments, int64_t group) {
  // Both are read from front to end, but a page holds only two segments, too few for the machine to
  // fetch ahead by itself.
  constexpr int kAhead = 4, kLine = 64 / sizeof(uint32_t);
  constexpr int kGroupWords = kLanes * kGroupSteps, kSegmentSize = kSegmentWords * kLanes;
  bitmap += group * kGroupWords;
  for (int i = 0; i < kGroupWords; i += kLine) {
    __builtin_prefetch(bitmap + kAhead * kGroupWords + i);
  }
  const uint32_t word = entries[group * kGroupSteps / kEntrySteps * kEntryWords + 1] >>
                        (16 + group * kGroupSteps % kEntrySteps);
  ring->resident += CountHalves(word & 0xF);
  for (; ring->end < ring->resident; ++ring->end) {
    if (ring->end >= segments) continue;
    const int slot = ring->end % Ring::kSlots;
    const uint32_t* segment = values + ring->end * kSegmentSize;
    for (int i = 0; i < kSegmentSize; i += kLine) {
      __builtin_prefetch(segment + kAhead * kSegmentSize + i);
    }
    LoadSegment(segment, ring->streams + slot * kSegmentWords);
    if (slot == 0) LoadSegment(segment, ring->streams + Ring::kWords);
  }
  ReadMasks(ring, bitmap);
}

}  // namespace
}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_STREAM_INC_H_
