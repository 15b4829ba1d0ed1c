// Expanding a packed weight into a dense array, (m, k) or (k, m): for prefill and to_dense().
#ifndef FLASHJAX_CUDA_LSCD_UNPACK_CUH_
#define FLASHJAX_CUDA_LSCD_UNPACK_CUH_

#include <cstdint>

#include "cpu/lscd_layout.h"
#include "cuda/common/ptx.cuh"
#include "cuda/dense_output.h"
#include "cuda/lscd_async_ring.cuh"
#include "cuda/lscd_strip_reader.cuh"

namespace flashjax {

// A warp expands kPieceGroups groups of a strip. Every step goes through the warp's own shared
// memory so that it is written in 16-byte chunks of whole 32-byte sectors.
inline constexpr int kUnpackWarps = 4;
inline constexpr int kPieceGroups = 8;

// (m, k): 16 rows of 64 k.
struct RowMajor {
  static constexpr int kStride = kStepK + 8;  // uint16: 16-byte aligned rows without bank conflicts
  static constexpr int kTileSize = kStripRows * kStride;
  static constexpr int kRowChunks = kStepK / 8;

  __device__ static void Put(uint16_t* tile, int row, int column, uint32_t pair) {
    *reinterpret_cast<uint32_t*>(tile + row * kStride + column) = pair;
  }
  __device__ static int64_t Row(int64_t m0, int64_t, int i) { return m0 + i; }
  __device__ static int64_t Column(int64_t, int64_t k0, int i) { return k0 + i; }
};

// (k, m): 64 rows of 16 m.
struct ColumnMajor {
  static constexpr int kStride = kStripRows + 8;
  static constexpr int kTileSize = kStepK * kStride;
  static constexpr int kRowChunks = kStripRows / 8;

  __device__ static void Put(uint16_t* tile, int row, int column, uint32_t pair) {
    tile[column * kStride + row] = static_cast<uint16_t>(pair);
    tile[(column + 1) * kStride + row] = static_cast<uint16_t>(pair >> 16);
  }
  __device__ static int64_t Row(int64_t, int64_t k0, int i) { return k0 + i; }
  __device__ static int64_t Column(int64_t m0, int64_t, int i) { return m0 + i; }
};

template <typename Order>
__device__ __forceinline__ void WriteTile(const uint16_t* tile, const DenseOutput& out, int64_t m0,
                                          int64_t k0, int lane) {
#pragma unroll
  for (int i = lane; i < kStripRows * kStepK / 8; i += kLanes) {
    const int tile_row = i / Order::kRowChunks, tile_column = i % Order::kRowChunks * 8;
    const int64_t row = Order::Row(m0, k0, tile_row), column = Order::Column(m0, k0, tile_column);
    if (row >= out.rows || column >= out.columns) continue;
    const uint16_t* source = tile + tile_row * Order::kStride + tile_column;
    uint16_t* destination = out.data + row * out.columns + column;
    if (out.aligned) {
      *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int j = 0; j < 8 && column + j < out.columns; ++j) destination[j] = source[j];
    }
  }
}

// Weight is PackedWeight or PackedStack.
template <typename Order, typename Weight>
__global__ void __launch_bounds__(kUnpackWarps* kLanes)
    UnpackKernel(const Weight weight, const DenseOutput out) {
  const PackedWeight& w = Select(weight);
  uint8_t* const shared = DynamicShared();
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const int strip = blockIdx.x * kUnpackWarps + warp;
  if (strip >= w.strips) return;
  const int group0 = blockIdx.y * kPieceGroups;
  const int group1 = min(group0 + kPieceGroups, w.groups);
  uint16_t* tiles = reinterpret_cast<uint16_t*>(shared + kUnpackWarps * AsyncRing::kBytes) +
                    warp * 2 * Order::kTileSize;

  StripReader<AsyncRing> reader(w, lane);
  reader.ring.data = SharedAddress(shared) + warp * AsyncRing::kBytes;
  reader.Begin(strip, group0, strip, group1);
  reader.CopyFirst();
  reader.WaitForFirstStep();
#pragma unroll 1
  for (int group = group0; group < group1; ++group) {
    reader.LoadAhead(group + 1 < group1);
#pragma unroll
    for (int step = 0; step < kGroupSteps; ++step) {
      const uint32_t word = reader.BeginStep(step);
      uint16_t* tile = tiles + step % 2 * Order::kTileSize;
      uint32_t a[4][4];
      DecodeHalf(0, word, reader.p, reader.q, a);
      DecodeHalf(1, word, reader.p, reader.q, a + 2);
#pragma unroll
      for (int f = 0; f < 4; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Order::Put(tile, 8 * (i % 2) + g, 16 * f + 8 * (i / 2) + 2 * t, a[f][i]);
        }
      }
      // One barrier a step is enough: the other tile was read before the previous one.
      __syncwarp();
      WriteTile<Order>(tile, out, int64_t{strip} * kStripRows,
                       int64_t{group} * kGroupK + step * kStepK, lane);
    }
    reader.NextGroup();
  }
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_UNPACK_CUH_
