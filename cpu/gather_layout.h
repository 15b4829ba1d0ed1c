// The packed layout for many zeros and few tokens, shared by the packer and the CUDA kernel.
//
// W is M x K, half precision. Only nonzeros are stored, each with the distance of its column from
// the one before: 3 bytes a nonzero, and time that goes with their number.
//
//   strip   32 rows of W, one a lane of a warp. Rows are sorted by their nonzeros within blocks of
//           kBlockRows, so that the lanes of a strip have about as many.
//   chunk   8 stored values of every lane of a strip. All lanes of a strip have the same chunks;
//           short rows end with zeros.
//   unit    what a warp begins with anywhere: of a strip's n chunks, [n u / units, n (u + 1) /
//           units) are unit u. `panels` equal runs of units are read by as many CTAs of a cluster.
//
//   values  uint32 [chunks][32 lanes][4]: 8 half-precision values of every lane
//   bitmap  uint32 [chunks][32 lanes][2]: 8 signed bytes of every lane: the column of a value
//           minus that of the lane's value before it, which is 0 before a strip's first chunk.
//           (The name is that of the other layout's array that says where values belong.)
//   entries uint32 [strips + 1][1 + 32 + 16 units]
//             word 0         the strip's first chunk
//             words 1..32    the row of every lane; M and beyond: none. Every row has its lane:
//                            what no lane has, the kernel does not write.
//             words 33..     uint16 [units][32 lanes]: the column before the unit's first value
//           and in the last row: word 0 the number of chunks, words 1 + 2 p and 2 + 2 p the columns
//           [begin, end), multiples of 8, that hold all that the units of panel p point to.
//   counts  uint32 [strips]: nonzeros of the strip.
//
// Order within a row. The kernel holds x as [column][8 tokens], 16 bytes a column, and 8 lanes at
// a time read it: without conflicts if their columns differ modulo 8. So a lane may take any of its
// nonzeros that are less than kWindow columns beyond its first one left, and the packer picks,
// step by step, of 8 lanes those whose columns modulo 8 differ. Where the next nonzero is further
// than a byte reaches, zeros lead to it. A zero stands for no element of W: the row's sum is that
// of its nonzeros, plus 0 times some of x.
#ifndef FLASHJAX_CPU_GATHER_LAYOUT_H_
#define FLASHJAX_CPU_GATHER_LAYOUT_H_

#include <cstdint>

#include "cpu/ceil_div.h"

namespace flashjax::gather {

inline constexpr int kLanes = 32;
inline constexpr int kBlockRows = 256;
inline constexpr int kChunkValues = 8;  // of a lane
inline constexpr int kPanelUnits = 16;
inline constexpr int kReach = 127;   // of a signed byte
inline constexpr int kWindow = 120;  // less than kReach, and so are the distances back
inline constexpr int kTokens = 8;
// Columns of x that fit into a CTA's shared memory beside its sums, and how many the panels are
// meant to have: the difference is for rows that advance unevenly.
inline constexpr int kPanelColumns = 10240;
inline constexpr int kPanelTarget = 7168;
inline constexpr int kMaxPanels = 8;  // CTAs of a portable cluster
inline constexpr int kMaxColumns = 1 << 16;

// The sizes that follow from M and K alone.
struct GatherShape {
  int64_t m, k;

  constexpr int64_t strips() const { return CeilDiv(m, kLanes); }
  // What the layout can hold: columns of 16 bits, something to store.
  constexpr bool fits() const { return m > 0 && k > 0 && k <= kMaxColumns; }
  constexpr int panels() const {
    int n = 2;
    while (n < kMaxPanels && int64_t{n} * kPanelTarget < k) n *= 2;
    return n;
  }
  constexpr int units() const { return panels() * kPanelUnits; }
  constexpr int64_t entry_words() const { return 1 + kLanes + int64_t{units()} * kLanes / 2; }
};

}  // namespace flashjax::gather

#endif  // FLASHJAX_CPU_GATHER_LAYOUT_H_
