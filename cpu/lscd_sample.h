// Sampling a dense matrix at the positions that a packed matrix stores, on the CPU.
#ifndef FLASHJAX_CPU_LSCD_SAMPLE_H_
#define FLASHJAX_CPU_LSCD_SAMPLE_H_

#include <cstdint>

#include "cpu/lscd_layout.h"
#include "cpu/parallel.h"

namespace flashjax {

// `slots` is float [16 * segments words][32 lanes][2 streams], a place for every half of `values`.
struct LscdSlots {
  LscdShape shape;
  const uint32_t* bitmap;
  const uint32_t* entries;
  float* slots;
  int64_t segments;
};

// Writes the elements of `block`, (16 * strips, K) and the rows of W from strip `first` on, into
// the slots of the positions that these strips store. Other slots stay.
void LscdSample(const LscdSlots& w, const float* block, int64_t first, int64_t strips,
                const ParallelFor& parallel_for);

}  // namespace flashjax

#endif  // FLASHJAX_CPU_LSCD_SAMPLE_H_
