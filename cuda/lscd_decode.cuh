// Expanding the packed layout (cpu/lscd_layout.h) into tensor-core fragments.
//
// A warp owns a strip. Its values arrive in a ring of segments in shared memory, in which the bank
// is the lane; a lane walks its two streams with the addresses p (stream 0) and q (stream 1).
// A pair of positions (b0, b1) becomes one register of the fragment without a branch:
//     u0 = LDS.U16 [p], u1 = LDS.U16 [p + 1 word], both zero-extended, loaded unconditionally;
//     register = PRMT(u0, u1, selector), selector linear in the bits (one dp2a);
//     p += (b0 + b1) words (one dp4a over a byte of bits per position parity).
#ifndef FLASHJAX_CUDA_LSCD_DECODE_CUH_
#define FLASHJAX_CUDA_LSCD_DECODE_CUH_

#include <cstdint>

#include "cpu/lscd_layout.h"
#include "cuda/common/ptx.cuh"
#include "cuda/lscd_packed_args.h"

namespace flashjax {

// W as the kernels see it.
struct PackedWeight {
  const uint4* bitmap;
  const uint32_t* entries;
  const uint8_t* values;
  int m;
  int strips;
  int groups;
  int entries_per_strip;
  int layer;  // of the stack that it is one of, or 0
};

// Matrices of one shape, each in the same arrays as the one before; which of them to use stands on
// the device, so that a loop over layers copies no weights.
struct PackedStack {
  PackedWeight first;
  const int32_t* layer;
  int layers;
  int64_t segments;  // of the values of each
};

__device__ __forceinline__ PackedWeight Select(const PackedWeight& w) { return w; }

// An index out of range means the nearest matrix, as for JAX's dynamic slices.
__device__ __forceinline__ PackedWeight Select(const PackedStack& stack) {
  const int64_t layer = max(0, min(*stack.layer, stack.layers - 1));
  PackedWeight w = stack.first;
  w.layer = static_cast<int>(layer);
  w.bitmap += layer * w.strips * w.groups * kLanes;
  w.entries += layer * w.strips * w.entries_per_strip * kEntryWords;
  w.values += layer * stack.segments * kSegmentBytes;
  return w;
}

inline PackedWeight MakePackedWeight(const LscdPackedArgs& packed, int64_t m, int64_t k) {
  const LscdShape shape{m, k};
  PackedWeight w{};
  w.bitmap = reinterpret_cast<const uint4*>(packed.bitmap);
  w.entries = packed.entries;
  w.values = reinterpret_cast<const uint8_t*>(packed.values);
  w.m = static_cast<int>(m);
  w.strips = static_cast<int>(shape.strips());
  w.groups = static_cast<int>(shape.groups());
  w.entries_per_strip = static_cast<int>(shape.entries());
  return w;
}

inline PackedStack MakePackedStack(const LscdPackedArgs& packed, int64_t m, int64_t k) {
  return {MakePackedWeight(packed, m, k), packed.layer, static_cast<int>(packed.layers),
          packed.segments};
}

inline constexpr int kEntryGroups = kEntrySteps / kGroupSteps;
inline constexpr int kWordBytes = kLanes * 4;  // one word of every lane

// Of a ring of segments. The first one is mirrored behind the last one, so that a step never wraps
// in the middle.
constexpr int RingBytes(int segments) { return (segments + 1) * kSegmentBytes; }

// A 16x16 fragment of `word` (a lane's bitmap of a step) is decoded in three parts. `fragment`, of
// the step's four, must be known where this is unrolled.
//
// Selectors, from the bits: nibbles 0, 1 are u0, nibbles 2, 3 its zero half: 0x3232 selects
// nothing, adding 0x43DE for b0 gives u0 to the lower half (and u1 to the upper), adding 0xDE00 for
// b1 shifts.
__device__ __forceinline__ void MakeSelectors(int fragment, uint32_t word, uint32_t s[4]) {
  const uint32_t w = word >> (2 * fragment);
  const uint32_t first = w & 0x01010101u, second = w & 0x02020202u;  // pairs 2F and 2F + 1
  s[0] = first * 0x43deu + 0x3232u;
  s[1] = __dp2a_hi(0xde0043deu, first, 0x3232u);
  s[2] = second * 0x21efu + 0x3232u;
  s[3] = __dp2a_hi(0xef0021efu, second, 0x3232u);
}

// Values: u0 and u1 of the four pairs.
__device__ __forceinline__ void LoadValues(int fragment, uint32_t word, uint32_t& p, uint32_t& q,
                                           uint32_t u[8]) {
  const uint32_t w = word >> (2 * fragment);
  const uint32_t first = w & 0x01010101u, second = w & 0x02020202u;
  const uint32_t p1 = __dp4a(first, 0x00008080u, p), q1 = __dp4a(first, 0x80800000u, q);
  u[0] = LoadSharedU16(p), u[1] = LoadSharedU16(p + kWordBytes);
  u[2] = LoadSharedU16(q), u[3] = LoadSharedU16(q + kWordBytes);
  u[4] = LoadSharedU16(p1), u[5] = LoadSharedU16(p1 + kWordBytes);
  u[6] = LoadSharedU16(q1), u[7] = LoadSharedU16(q1 + kWordBytes);
  p = __dp4a(second, 0x00004040u, p1);
  q = __dp4a(second, 0x40400000u, q1);
}

// Registers: r[0..3] of mma.m16n8k16's A.
__device__ __forceinline__ void SelectValues(const uint32_t u[8], const uint32_t s[4],
                                             uint32_t r[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = Permute(u[2 * i], u[2 * i + 1], s[i]);
}

// The fragments of half a step: 0 and 1, or 2 and 3.
__device__ __forceinline__ void DecodeHalf(int half, uint32_t word, uint32_t& p, uint32_t& q,
                                           uint32_t a[2][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t s[4], u[8];
    MakeSelectors(2 * half + i, word, s);
    LoadValues(2 * half + i, word, p, q, u);
    SelectValues(u, s, a[i]);
  }
}

// DecodeHalf in two parts: the loads, and what writes the fragments' registers.
__device__ __forceinline__ void LoadHalf(int half, uint32_t word, uint32_t& p, uint32_t& q,
                                         uint32_t u[2][8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) LoadValues(2 * half + i, word, p, q, u[i]);
}

__device__ __forceinline__ void SelectHalf(int half, uint32_t word, const uint32_t u[2][8],
                                           uint32_t a[2][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t s[4];
    MakeSelectors(2 * half + i, word, s);
    SelectValues(u[i], s, a[i]);
  }
}

// Where the streams of a warp stand before a group of a strip.
struct StreamStart {
  uint32_t first;     // segment of the least advanced stream
  uint32_t resident;  // segments [first, resident) must be there before the group's first step
  uint32_t p, q;      // words from `first` to the lane's next value of streams 0 and 1
};

__device__ __forceinline__ const uint32_t* StripEntries(const PackedWeight& w, int strip) {
  return w.entries + int64_t{strip} * w.entries_per_strip * kEntryWords;
}

__device__ __forceinline__ StreamStart FindStart(const PackedWeight& w, int strip, int group,
                                                 int lane) {
  const int e = group / kEntryGroups, skip = group % kEntryGroups;
  const uint32_t* entry = StripEntries(w, strip) + e * kEntryWords;
  const uint8_t* offsets = reinterpret_cast<const uint8_t*>(entry + 2);
  uint32_t p = offsets[lane], q = offsets[kLanes + lane];
  const uint32_t base = entry[0], schedule = entry[1];
  // Entries are sparse; what lies between one and the group is counted in the bitmap.
  const uint4* bits = w.bitmap + (int64_t{strip} * w.groups + e * kEntryGroups) * kLanes + lane;
#pragma unroll
  for (int i = 0; i < kEntryGroups - 1; ++i) {
    if (i < skip) {
      const uint4 b = bits[i * kLanes];
      p += __popc(__byte_perm(b.x, b.y, 0x5410)) + __popc(__byte_perm(b.z, b.w, 0x5410));
      q += __popc(__byte_perm(b.x, b.y, 0x7632)) + __popc(__byte_perm(b.z, b.w, 0x7632));
    }
  }
  const uint32_t begun = (schedule >> 16) & ((1u << (kGroupSteps * skip)) - 1);
  const uint32_t least = __reduce_min_sync(0xffffffffu, min(p, q)) / kSegmentWords;
  StreamStart start;
  start.first = base + least;
  start.resident = base + (schedule & 0xffffu) + __popc(begun);
  start.p = p - least * kSegmentWords;
  start.q = q - least * kSegmentWords;
  return start;
}

// The segments before this one hold all that the groups of a strip before `group1` need.
__device__ __forceinline__ uint32_t FindEnd(const PackedWeight& w, int strip, int group1) {
  const int e = (group1 - 1) / kEntryGroups, steps = kGroupSteps * (group1 - e * kEntryGroups);
  const uint32_t* entry = StripEntries(w, strip) + e * kEntryWords;
  const uint32_t base = entry[0], schedule = entry[1];
  const uint32_t begun = (schedule >> 16) & ((1u << steps) - 1);
  return base + (schedule & 0xffffu) + __popc(begun);
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_DECODE_CUH_
