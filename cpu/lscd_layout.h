// The packed layout of a sparse matrix, shared by the CPU code and the CUDA kernels.
//
// W is M x K (M output features, K input features), half precision, any pattern of zeros.
//
//   strip   16 rows of W: the M side of one tensor-core tile (m16n8k16).
//   step    64 consecutive k of a strip: four 16x16 tensor-core fragments.
//   stream  what one lane of a warp consumes for one of its two rows. Lane l = 4 g + t (g = l / 4,
//           t = l % 4) owns rows g (stream 0) and g + 8 (stream 1) of the strip, and of every
//           16 k the four columns {2t, 2t+1, 2t+8, 2t+9}: exactly its share of a fragment A.
//           A stream therefore has 16 positions a step, numbered i = 0..15:
//             pair p = i / 2 (0..7), column k = 64 step + 16 (p / 2) + 8 (p % 2) + 2 t + (i % 2)
//
//   bitmap  uint32 [strips][groups][32 lanes][4 steps]; bit  16 s + 8 (i % 2) + i / 2  of the word
//           says that position i of stream s holds a stored value. (A lane loads a group's four
//           steps as one 16-byte word.)
//   values  uint32 [segments][16 words][32 lanes]: a lane's two streams, stream 0 in the low half
//           and stream 1 in the high half of a word. The n-th stored value of a stream is in word
//           n, so the shared-memory bank is the lane, whatever the pattern.
//   entries uint32 [strips][ceil(steps / 16)][18]: where the streams stand before steps 0, 16, ...
//             word 0       base: the segment that holds the least advanced stream's next word
//             word 1       low half: resident - base, where `resident` is the number of segments
//                          (from 0) that hold everything consumed before this step;
//                          high half: bit j says that step 16 e + j needs one segment more
//             words 2..17  64 bytes: words from base to the next value of stream 0 of lanes 0..31,
//                          then of stream 1 of lanes 0..31
//   counts  uint32 [strips]: nonzeros of the strip (without the explicit zeros below).
//
// Streams drift apart, because their numbers of nonzeros differ. The kernels keep a ring of
// kRingSegments segments a warp, so the packer stores explicit zeros in streams that fall behind:
// before step t is decoded, every stream must have left the slot that the segment fetched kPrefetch
// ahead will overwrite. Closer streams start a kernel sooner, because it begins with all segments
// over which they are spread, but take more zeros: `spread` is less than the ring allows, except
// for large matrices, to which a microsecond is little and a percent of memory much, and for small
// ones, whose ends of chains take enough. It is least for matrices that are packed for few tokens
// (`for_few_tokens`), which start most often. With n(q) the number of values stored in stream q
// before step t, and c(q, t) the nonzeros of step t (c(q, t + 1) = 0 at a chain's last step), it
// raises every n(q) + c(q, t) below
//     16 (ceil(max_q(n(q) + c(q, t) + c(q, t + 1)) / 16) - spread)
// to that bound, by marking the lowest unmarked positions i of step t; the values stored there are
// 0x0000, also where the dense weight is -0.0 (0x8000), which counts as zero. This always succeeds:
// the bound grows by at most 16 a step. The cost is 4 to 8% more values on random patterns, for few
// tokens 9 to 13%.
//
// Strips are chained: the streams of a chain of kChainSteps steps or more run on from strip to
// strip (step t + 1 of a strip's last step is the next strip's first) and only a chain's end is
// rounded up to whole segments: ceil(max_q n(q) / 16) of them, none if the chain stores nothing.
// Chains are packed independently; the first segment of a chain is the number of segments of all
// chains before it, and both base and resident start there. Beyond M or K there are no nonzeros,
// but there may be explicit zeros. Words past a stream's end, bits j of steps beyond the strip's
// last and everything else unused are zero: the arrays are unique.
#ifndef FLASHJAX_CPU_LSCD_LAYOUT_H_
#define FLASHJAX_CPU_LSCD_LAYOUT_H_

#include <cstdint>

#include "cpu/ceil_div.h"

namespace flashjax {

inline constexpr int kStripRows = 16;
inline constexpr int kStepK = 64;
inline constexpr int kGroupSteps = 4;
inline constexpr int kGroupK = kGroupSteps * kStepK;
inline constexpr int kLanes = 32;
inline constexpr int kStreams = 2 * kLanes;
inline constexpr int kStreamPositions = 16;  // positions of a stream in a step
inline constexpr int kSegmentWords = 16;     // words of a lane in a segment
inline constexpr int kSegmentBytes = kSegmentWords * kLanes * 4;
inline constexpr int kRingSegments = 5;
inline constexpr int kPrefetch = 1;
inline constexpr int kMaxSpread = kRingSegments - kPrefetch, kMinSpread = 2;
inline constexpr int64_t kSmallElements = 1 << 22, kLargeElements = 400'000'000;
inline constexpr int kEntrySteps = 16;
inline constexpr int kEntryWords = 18;
inline constexpr int kChainSteps = 2048;

// The sizes that follow from M and K alone, and how a matrix of them is packed.
struct LscdShape {
  int64_t m, k;
  bool for_few_tokens = false;

  constexpr int64_t strips() const { return CeilDiv(m, kStripRows); }
  constexpr int64_t groups() const { return CeilDiv(k, kGroupK); }
  constexpr int64_t steps() const { return groups() * kGroupSteps; }
  constexpr int64_t entries() const { return CeilDiv(steps(), kEntrySteps); }
  constexpr int64_t chain_strips() const {
    const int64_t n = steps() > 0 ? CeilDiv(kChainSteps, steps()) : 1;
    return n < strips() ? n : (strips() > 0 ? strips() : 1);
  }
  // Segments that streams may be apart.
  constexpr int spread() const {
    if (for_few_tokens) return kMinSpread;
    return m * k < kSmallElements || m * k > kLargeElements ? kMaxSpread : kMaxSpread - 1;
  }
  constexpr int64_t chains() const { return CeilDiv(strips(), chain_strips()); }
};

// The column (within a step) and the bitmap bit of position i; see the drawing above.
constexpr int PositionColumn(int t, int i) {
  return 16 * (i / 4) + 8 * ((i / 2) % 2) + 2 * t + i % 2;
}
constexpr int PositionBit(int stream, int i) { return 16 * stream + 8 * (i % 2) + i / 2; }

}  // namespace flashjax

#endif  // FLASHJAX_CPU_LSCD_LAYOUT_H_
