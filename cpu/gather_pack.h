// Packing on the host: a dense (K, M) row-major 16-bit matrix to the layout of gather_layout.h.
#ifndef FLASHJAX_CPU_GATHER_PACK_H_
#define FLASHJAX_CPU_GATHER_PACK_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/gather_layout.h"
#include "cpu/parallel.h"

namespace flashjax::gather {

// The strips of a block of rows, in its own memory.
struct Block {
  std::vector<uint32_t> values, columns;  // of its chunks, as in `values` and `bitmap`
};

// Writes entries and counts, whole, of a shape that fits. Returns the blocks, whose arrays, one
// after the other, are the matrix's; nothing if the nonzeros of a panel spread over more columns
// than a CTA can hold.
std::optional<std::vector<Block>> GatherPack(const uint16_t* dense, const GatherShape& shape,
                                             const ParallelFor& parallel_for, uint32_t* entries,
                                             uint32_t* counts);

}  // namespace flashjax::gather

#endif  // FLASHJAX_CPU_GATHER_PACK_H_
