// Sampling a dense block at the positions that a packed matrix stores: the gradient of its values.
//
// A warp owns the steps between two entries of a strip, a lane its two streams, as in the other
// kernels. Of every 16 columns four lanes read 32 contiguous bytes of a row, so sectors are used
// whole; what a lane writes is next to what its neighbours write, except for the drift of the
// streams.
#ifndef FLASHJAX_CUDA_LSCD_SAMPLE_CUH_
#define FLASHJAX_CUDA_LSCD_SAMPLE_CUH_

#include <cstdint>

#include "cpu/lscd_layout.h"
#include "cuda/lscd_sample_launch.h"

namespace flashjax {

inline constexpr int kSampleWarps = 4;

// The positions of one stream in one step, in order. `row` starts at the step's first column, of
// which `columns` exist. Returns the word after the stream's last one.
__device__ __forceinline__ int64_t SampleStream(const float* row, int64_t columns, int t,
                                                uint32_t bits, int64_t word, int64_t end,
                                                float* slots) {
#pragma unroll
  for (int i = 0; i < kStreamPositions; ++i) {
    if (!(bits >> PositionBit(0, i) & 1)) continue;
    const int column = PositionColumn(t, i);
    // Arrays that no packer made may point past the end; explicit zeros may lie beyond K.
    if (word < end) slots[word * kStreams] = column < columns ? row[column] : 0.0f;
    ++word;
  }
  return word;
}

__global__ void __launch_bounds__(kSampleWarps* kLanes) SampleKernel(const LscdSampleArgs args) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const int64_t index = int64_t{blockIdx.x} * kSampleWarps + warp;
  const int64_t entries = args.shape.entries();
  if (index >= args.strips * entries) return;
  const int64_t local = index / entries, e = index % entries;
  int64_t first = *args.first_strip;
  first = max(int64_t{0}, min(first, args.shape.strips() - args.strips));
  const int64_t strip = first + local;

  const uint32_t* entry = args.entries + (strip * entries + e) * kEntryWords;
  const uint8_t* offsets = reinterpret_cast<const uint8_t*>(entry + 2);
  const int64_t base = int64_t{entry[0]} * kSegmentWords;
  int64_t word0 = base + offsets[lane], word1 = base + offsets[kLanes + lane];
  const int64_t end = args.segments * kSegmentWords;
  float* slots = args.slots + 2 * lane;

  const int64_t k = args.shape.k, steps = args.shape.steps();
  const float* row0 = args.block + (local * kStripRows + g) * k;
  const float* row1 = row0 + 8 * k;
  const int64_t last = min((e + 1) * kEntrySteps, steps);
  for (int64_t step = e * kEntrySteps; step < last; ++step) {
    const int64_t group = strip * args.shape.groups() + step / kGroupSteps;
    const uint32_t bits = args.bitmap[(group * kLanes + lane) * kGroupSteps + step % kGroupSteps];
    const int64_t column = step * kStepK;
    word0 = SampleStream(row0 + column, k - column, t, bits & 0xffffu, word0, end, slots);
    word1 = SampleStream(row1 + column, k - column, t, bits >> 16, word1, end, slots + 1);
  }
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_SAMPLE_CUH_
