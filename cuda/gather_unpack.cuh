// Expanding a W in the gather layout (cpu/gather_layout.h): its nonzeros go to their places.
#ifndef FLASHJAX_CUDA_GATHER_UNPACK_CUH_
#define FLASHJAX_CUDA_GATHER_UNPACK_CUH_

#include <cstdint>

#include "cpu/gather_layout.h"
#include "cuda/common/ptx.cuh"
#include "cuda/gather_weight.cuh"

namespace flashjax::gather {

inline constexpr int kUnpackWarps = 8;

// Where an element goes: row * row_stride + column * column_stride.
struct DensePlace {
  uint16_t* dense;  // all zero
  int64_t rows;
  int64_t row_stride, column_stride;
};

// A block takes a strip, its warps some of the strip's units.
__global__ void __launch_bounds__(kUnpackWarps* kLanes)
    UnpackKernel(const PackedGather packed, const DensePlace out) {
  const GatherWeight w = Select(packed);
  const int lane = LaneId(), warp = threadIdx.x / kLanes, units = w.panels * kPanelUnits;
  const StripEntry entry = w.entry(blockIdx.x);
  const int chunk = entry.chunk(), chunks = w.entry(blockIdx.x + 1).chunk() - chunk;
  const bool has_row = entry.row(lane) < out.rows;
  uint16_t* const row = out.dense + (has_row ? entry.row(lane) : 0) * out.row_stride;
  const int unit = units / kUnpackWarps * warp, end = unit + units / kUnpackWarps;
  int column = entry.column(unit, lane);
  for (int i = UnitChunk(unit, chunks, w.panels); i < UnitChunk(end, chunks, w.panels); ++i) {
    const int64_t at = (int64_t{chunk} + i) * kLanes + lane;
    const uint4 v = LoadStreaming(w.values + at);
    const uint2 c = LoadStreaming(w.columns + at);
    const uint32_t values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < kChunkValues; ++j) {
      column += static_cast<int8_t>((j < 4 ? c.x : c.y) >> (8 * (j % 4)));
      const auto value = static_cast<uint16_t>(values[j / 2] >> (16 * (j % 2)));
      // A zero may stand at the place of a nonzero.
      if (has_row && value != 0) row[column * out.column_stride] = value;
    }
  }
}

}  // namespace flashjax::gather

#endif  // FLASHJAX_CUDA_GATHER_UNPACK_CUH_
