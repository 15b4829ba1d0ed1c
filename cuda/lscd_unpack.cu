// Expanding a packed weight into a dense array, (m, k) or (k, m): for prefill and to_dense().
#include "cpu/lscd_layout.h"
#include "cuda/lscd_mma.cuh"
#include "cuda/lscd_pack_launch.h"
#include "cuda/lscd_strip_reader.cuh"

namespace flashjax {
namespace {

// A CTA expands kPieceGroups groups of four strips, a warp a strip; every step goes through shared
// memory so that whole rows are written.
constexpr int kUnpackWarps = 4;
constexpr int kUnpackRows = kUnpackWarps * kStripRows;
constexpr int kPieceGroups = 8;

// (m, k): a warp writes its own strip, rows of 64 k = 128 bytes.
struct RowMajor {
  static constexpr int kStride = kStepK + 8;  // uint16: 16-byte aligned rows, few conflicts
  static constexpr int kTileSize = kUnpackRows * kStride;

  __device__ static void Put(uint16_t* tile, int row, int column, uint32_t pair) {
    *reinterpret_cast<uint32_t*>(tile + row * kStride + column) = pair;
  }
  __device__ static void Write(const uint16_t* tile, const LscdShape& shape, int64_t m0,
                               int64_t k0, uint16_t* dense) {
    const bool whole = shape.k % 8 == 0;
    constexpr int kChunks = kStepK / 8;
    for (int i = threadIdx.x; i < kUnpackRows * kChunks; i += kUnpackWarps * kLanes) {
      const int64_t m = m0 + i / kChunks, k = k0 + i % kChunks * 8;
      if (m >= shape.m || k >= shape.k) continue;
      const uint16_t* source = tile + i / kChunks * kStride + i % kChunks * 8;
      uint16_t* out = dense + m * shape.k + k;
      if (whole) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(source);
      } else {
        for (int j = 0; j < 8 && k + j < shape.k; ++j) out[j] = source[j];
      }
    }
  }
};

// (k, m): the four strips are 64 adjacent columns, rows of 128 bytes.
struct ColumnMajor {
  static constexpr int kStride = kUnpackRows + 8;
  static constexpr int kTileSize = kStepK * kStride;

  __device__ static void Put(uint16_t* tile, int row, int column, uint32_t pair) {
    tile[column * kStride + row] = static_cast<uint16_t>(pair);
    tile[(column + 1) * kStride + row] = static_cast<uint16_t>(pair >> 16);
  }
  __device__ static void Write(const uint16_t* tile, const LscdShape& shape, int64_t m0,
                               int64_t k0, uint16_t* dense) {
    const bool whole = shape.m % 8 == 0;
    constexpr int kChunks = kUnpackRows / 8;
    for (int i = threadIdx.x; i < kStepK * kChunks; i += kUnpackWarps * kLanes) {
      const int64_t k = k0 + i / kChunks, m = m0 + i % kChunks * 8;
      if (m >= shape.m || k >= shape.k) continue;
      const uint16_t* source = tile + i / kChunks * kStride + i % kChunks * 8;
      uint16_t* out = dense + k * shape.m + m;
      if (whole) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(source);
      } else {
        for (int j = 0; j < 8 && m + j < shape.m; ++j) out[j] = source[j];
      }
    }
  }
};

template <typename Order>
__global__ void __launch_bounds__(kUnpackWarps * kLanes)
    UnpackKernel(const PackedWeight w, const LscdShape shape, uint16_t* dense) {
  extern __shared__ __align__(128) uint8_t shared[];
  uint16_t* tiles = reinterpret_cast<uint16_t*>(shared + kUnpackWarps * kRingStride);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const int group0 = blockIdx.y * kPieceGroups;
  const int group1 = min(group0 + kPieceGroups, w.groups);
  const int64_t m0 = int64_t{blockIdx.x} * kUnpackRows;

  StripReader<AsyncRing> reader(w, lane);
  reader.ring.data = SharedAddress(shared) + warp * kRingStride;
  reader.Begin(blockIdx.x * kUnpackWarps + warp, group0, group1);
  reader.WaitForFirstStep();
  int buffer = 0;
#pragma unroll 1
  for (int group = group0; group < group1; ++group) {
    reader.LoadAhead(group + 1 < group1);
#pragma unroll
    for (int step = 0; step < kGroupSteps; ++step) {
      const uint32_t word = reader.BeginStep(step);
      uint16_t* tile = tiles + buffer * Order::kTileSize;
      uint32_t a[4][4];
      DecodeFragment<0>(word, reader.p, reader.q, a[0]);
      DecodeFragment<1>(word, reader.p, reader.q, a[1]);
      DecodeFragment<2>(word, reader.p, reader.q, a[2]);
      DecodeFragment<3>(word, reader.p, reader.q, a[3]);
#pragma unroll
      for (int f = 0; f < 4; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp * kStripRows + 8 * (i % 2) + g;
          Order::Put(tile, row, 16 * f + 8 * (i / 2) + 2 * t, a[f][i]);
        }
      }
      // One barrier a step is enough: the other buffer was read before the previous one.
      __syncthreads();
      Order::Write(tile, shape, m0, int64_t{group} * kGroupK + step * kStepK, dense);
      buffer ^= 1;
    }
    reader.NextGroup();
  }
}

template <typename Order>
cudaError_t Launch(const PackedWeight& w, const LscdShape& shape, uint16_t* dense,
                   cudaStream_t stream) {
  constexpr int kSharedBytes = kUnpackWarps * kRingStride + 2 * Order::kTileSize * 2;
  const cudaError_t error = cudaFuncSetAttribute(
      UnpackKernel<Order>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(CeilDiv(shape.m, kUnpackRows)),
                  static_cast<unsigned>(CeilDiv(w.groups, kPieceGroups)));
  UnpackKernel<Order><<<grid, kUnpackWarps * kLanes, kSharedBytes, stream>>>(w, shape, dense);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchLscdUnpack(const uint32_t* bitmap, const uint32_t* entries,
                             const uint32_t* values, int64_t m, int64_t k, bool transposed,
                             uint16_t* dense, cudaStream_t stream) {
  if (m == 0 || k == 0) return cudaSuccess;
  const PackedWeight w = MakePackedWeight(bitmap, entries, values, m, k);
  return transposed ? Launch<ColumnMajor>(w, LscdShape{m, k}, dense, stream)
                    : Launch<RowMajor>(w, LscdShape{m, k}, dense, stream);
}

}  // namespace flashjax
