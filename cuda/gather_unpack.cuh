// Expanding a W in the gather layout (cpu/gather_layout.h): its nonzeros go to their places.
//
// A block expands a tile in shared memory, so that whole sectors are written, each once. It reads
// the units that may reach into the tile's columns; those at its edges are read by its neighbours,
// too.
#ifndef FLASHJAX_CUDA_GATHER_UNPACK_CUH_
#define FLASHJAX_CUDA_GATHER_UNPACK_CUH_

#include <climits>
#include <cstdint>

#include "cpu/gather_layout.h"
#include "cuda/common/ptx.cuh"
#include "cuda/dense_output.h"
#include "cuda/gather_weight.cuh"

namespace flashjax::gather {

inline constexpr int kUnpackThreads = 256;

// (m, k): the rows of one strip, wherever these are.
struct RowMajor {
  static constexpr int kStrips = 1, kColumns = 1024;
  static constexpr int kLines = kLanes, kLength = kColumns;  // of a tile in shared memory
  static constexpr int kStride = kLength + 8;  // uint16: 16-byte aligned lines, other banks

  __device__ static int Place(int, int lane, int column) { return lane * kStride + column; }
  // Of an element in y: which line, or M or K and beyond, and where in it.
  __device__ static int64_t Line(const StripEntry& entry, int, int i) { return entry.row(i); }
  __device__ static int64_t First(int, int column0) { return column0; }
};

// (k, m): all rows of a block, among which the strips have divided them.
struct ColumnMajor {
  static constexpr int kStrips = kBlockRows / kLanes, kColumns = 128;
  static constexpr int kLines = kColumns, kLength = kBlockRows;
  static constexpr int kStride = kLength + 8;

  __device__ static int Place(int row, int, int column) { return column * kStride + row; }
  __device__ static int64_t Line(const StripEntry&, int column0, int i) { return column0 + i; }
  __device__ static int64_t First(int row0, int) { return row0; }
};

// Puts a lane's values of a unit that are in the tile's columns, from `column0` on, to their
// places.
template <typename Order>
__device__ __forceinline__ void ExpandUnit(const GatherWeight& w, const StripEntry& entry,
                                           int chunks, int unit, int row, int column0, int lane,
                                           uint16_t* tile) {
  int column = entry.column(unit, lane) - column0;
  const int end = UnitChunk(unit + 1, chunks, w.panels);
  for (int i = UnitChunk(unit, chunks, w.panels); i < end; ++i) {
    const int64_t at = (int64_t{entry.chunk()} + i) * kLanes + lane;
    const uint4 v = w.values[at];
    const uint2 c = w.columns[at];
    const uint32_t values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < kChunkValues; ++j) {
      column += static_cast<int8_t>((j < 4 ? c.x : c.y) >> (8 * (j % 4)));
      const auto value = static_cast<uint16_t>(values[j / 2] >> (16 * (j % 2)));
      const bool inside = static_cast<unsigned>(column) < static_cast<unsigned>(Order::kColumns);
      // A zero may stand at the place of a nonzero.
      if (row >= 0 && value != 0 && inside) tile[Order::Place(row, lane, column)] = value;
    }
  }
}

template <typename Order>
__global__ void __launch_bounds__(kUnpackThreads)
    UnpackKernel(const PackedGather packed, const DenseOutput out, uint32_t rows) {
  constexpr int kWarps = kUnpackThreads / kLanes, kChunks = Order::kLength / 8;
  const GatherWeight w = Select(packed);
  auto* const tile = reinterpret_cast<uint16_t*>(DynamicShared());
  const int lane = LaneId(), warp = threadIdx.x / kLanes, units = w.panels * kPanelUnits;
  const int strip0 = blockIdx.x * Order::kStrips, strips = min(Order::kStrips, w.strips - strip0);
  const int column0 = blockIdx.y * Order::kColumns;
  const uint32_t row0 = strip0 / (kBlockRows / kLanes) * kBlockRows;

  for (int i = threadIdx.x; i < Order::kLines * Order::kStride / 8; i += kUnpackThreads) {
    reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  for (int i = warp; i < strips * units; i += kWarps) {
    const int unit = i % units, strip = strip0 + i / units;
    const StripEntry entry = w.entry(strip);
    const uint32_t row = entry.row(lane), in_block = row - row0;
    const bool has_row = row < rows && in_block < kBlockRows;
    // The columns before the first value of this unit and of the next one: no other value is
    // kReach or more before the one, or beyond the other.
    const int first = entry.column(unit, lane) - kReach;
    const int last = unit + 1 < units ? entry.column(unit + 1, lane) + kReach : INT_MAX;
    const bool reaches = has_row && first < column0 + Order::kColumns && last >= column0;
    if (__all_sync(0xffffffffu, !reaches)) continue;
    const int chunks = w.entry(strip + 1).chunk() - entry.chunk();
    ExpandUnit<Order>(w, entry, chunks, unit, has_row ? static_cast<int>(in_block) : -1, column0,
                      lane, tile);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Order::kLines * kChunks; i += kUnpackThreads) {
    const int tile_line = i / kChunks, in_line = i % kChunks * 8;
    const int64_t line = Order::Line(w.entry(strip0), column0, tile_line);
    const int64_t first = Order::First(static_cast<int>(row0), column0) + in_line;
    if (line >= out.rows || first >= out.columns) continue;
    const uint16_t* source = tile + tile_line * Order::kStride + in_line;
    uint16_t* destination = out.data + line * out.columns + first;
    if (out.aligned) {
      *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int j = 0; j < 8 && first + j < out.columns; ++j) destination[j] = source[j];
    }
  }
}

}  // namespace flashjax::gather

#endif  // FLASHJAX_CUDA_GATHER_UNPACK_CUH_
