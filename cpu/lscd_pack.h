// Packing on the host, to the layout of lscd_layout.h.
#ifndef FLASHJAX_CPU_LSCD_PACK_H_
#define FLASHJAX_CPU_LSCD_PACK_H_

#include <cstdint>
#include <functional>

#include "cpu/lscd_layout.h"
#include "cpu/parallel.h"
#include "cpu/sparse_rows.h"

namespace flashjax {

// The sizes of the leaves in uint32 words.
inline int64_t BitmapWords(const LscdShape& s) {
  return s.strips() * s.groups() * kLanes * kGroupSteps;
}
inline int64_t EntriesWords(const LscdShape& s) { return s.strips() * s.entries() * kEntryWords; }

struct StripLoader {
  // Cuts strips of W into what each lane owns: of step t of the i-th of them, the 16-bit patterns
  // [64 streams][16 positions] at 1024 (i steps + t) of `tiles`, and which of them are not zero at
  // 64 (i steps + t) of `masks`. One of them is null.
  std::function<void(int64_t first_strip, int64_t strips, uint16_t* tiles, uint16_t* masks)> load;
  // How many strips it is best asked for: all of a chain, or one, whose tiles stay in the cache.
  bool by_chain;
};

// Of a dense (K, M) array, row-major, or of stored rows; both must outlive the loader.
StripLoader DenseStrips(const uint16_t* dense, const LscdShape& shape);
StripLoader RowStrips(const SparseRows& rows);

// First pass: writes bitmap, entries and counts, whole. Returns the number of segments.
int64_t LscdPlan(const StripLoader& strips, const LscdShape& shape, const ParallelFor& parallel_for,
                 uint32_t* bitmap, uint32_t* entries, uint32_t* counts);

// Second pass: writes values, uint32 [segments][16][32], whole, from what the first pass wrote.
void LscdFill(const StripLoader& strips, const LscdShape& shape, const ParallelFor& parallel_for,
              const uint32_t* bitmap, const uint32_t* entries, int64_t segments, uint32_t* values);

}  // namespace flashjax

#endif  // FLASHJAX_CPU_LSCD_PACK_H_
