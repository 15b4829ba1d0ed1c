// Packing on the host: dense (K, M) row-major 16-bit patterns to the layout of lscd_layout.h and
// back.
#ifndef FLASHJAX_CPU_LSCD_PACK_H_
#define FLASHJAX_CPU_LSCD_PACK_H_

#include <cstdint>

#include "cpu/lscd_layout.h"
#include "cpu/parallel.h"

namespace flashjax {

// The sizes of the leaves in uint32 words.
inline int64_t BitmapWords(const LscdShape& s) {
  return s.strips() * s.groups() * kLanes * kGroupSteps;
}
inline int64_t EntriesWords(const LscdShape& s) { return s.strips() * s.entries() * kEntryWords; }

// First pass: writes bitmap, entries and counts, whole. Returns the number of segments.
int64_t LscdPlan(const uint16_t* dense, const LscdShape& shape, const ParallelFor& parallel_for,
                 uint32_t* bitmap, uint32_t* entries, uint32_t* counts);

// Second pass: writes values, uint32 [segments][16][32], whole, from what the first pass wrote.
void LscdFill(const uint16_t* dense, const LscdShape& shape, const ParallelFor& parallel_for,
              const uint32_t* bitmap, const uint32_t* entries, int64_t segments, uint32_t* values);

}  // namespace flashjax

#endif  // FLASHJAX_CPU_LSCD_PACK_H_
