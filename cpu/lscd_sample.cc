#include "cpu/lscd_sample.h"

#include <algorithm>
#include <cstring>

#define FLASHJAX_SIMD 0
#define FLASHJAX_INLINE inline
#include "cpu/simd_common-inc.h"

namespace flashjax {
namespace {

// Where each stream stands: the word of its next value, counted from the start of `values`.
struct Streams {
  int64_t next[2][kLanes];

  explicit Streams(const uint32_t* entry) {
    uint8_t offsets[kStreams];
    std::memcpy(offsets, entry + 2, sizeof(offsets));
    for (int q = 0; q < kStreams; ++q) {
      next[q / kLanes][q % kLanes] = int64_t{entry[0]} * kSegmentWords + offsets[q];
    }
  }
};

// `row` is a row of W from the step's first column on, of which `columns` exist.
void SampleStream(const float* row, int64_t columns, int t, uint32_t mask, int64_t end,
                  int64_t* next, float* slots) {
  for (; mask != 0; mask &= mask - 1) {
    const int column = PositionColumn(t, __builtin_ctz(mask));
    const int64_t word = (*next)++;
    // Arrays that no packer made may point past the end; explicit zeros lie beyond K.
    if (word < end) slots[word * kStreams] = column < columns ? row[column] : 0.0f;
  }
}

void SampleStrip(const LscdSlots& w, const float* block, int64_t strip) {
  const LscdShape& shape = w.shape;
  Streams streams(w.entries + strip * shape.entries() * kEntryWords);
  const uint32_t* bitmap = w.bitmap + strip * shape.groups() * kLanes * kGroupSteps;
  const int64_t end = w.segments * kSegmentWords;
  for (int64_t step = 0; step < shape.steps(); ++step) {
    const uint32_t* words = bitmap + step / kGroupSteps * kLanes * kGroupSteps + step % kGroupSteps;
    const int64_t column = step * kStepK, columns = shape.k - column;
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t masks = ToPositionOrder(words[lane * kGroupSteps]);
      for (int stream = 0; stream < 2; ++stream) {
        const int64_t row = lane / 4 + 8 * stream;
        SampleStream(block + row * shape.k + column, columns, lane % 4,
                     masks >> 16 * stream & 0xFFFF, end, &streams.next[stream][lane],
                     w.slots + 2 * lane + stream);
      }
    }
  }
}

}  // namespace

void LscdSample(const LscdSlots& w, const float* block, int64_t first, int64_t strips,
                const ParallelFor& parallel_for) {
  // Every position has a slot of its own, so strips can be done in any order.
  parallel_for.run(
      strips, [&](int64_t i) { SampleStrip(w, block + i * kStripRows * w.shape.k, first + i); });
}

}  // namespace flashjax
