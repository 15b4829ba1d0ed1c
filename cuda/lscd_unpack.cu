// Expanding a packed weight into a dense (k, m) array: for prefill and SparseMatrix.to_dense().
#include "cpu/lscd_layout.h"
#include "cuda/lscd_pack_launch.h"

namespace flashjax {
namespace {

constexpr int kUnpackWarps = 8;
constexpr int kUnpackRows = kUnpackWarps * kStripRows;  // columns of the dense array a CTA writes
constexpr int kRowStride = kUnpackRows + 2;             // shared memory, uint16

// A CTA expands one entry's steps (1024 k) of 8 strips, a warp a strip, and writes them step by step
// with whole 256-byte rows.
__global__ void __launch_bounds__(kUnpackWarps * kLanes)
    UnpackKernel(const uint32_t* bitmap, const uint32_t* entries, const uint16_t* values,
                 const LscdShape shape, uint16_t* dense) {
  __shared__ uint16_t tile[kStepK * kRowStride];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const int64_t m0 = int64_t{blockIdx.x} * kUnpackRows;
  const int64_t strip = int64_t{blockIdx.x} * kUnpackWarps + warp;
  const bool live = strip < shape.strips();
  const int64_t first = int64_t{blockIdx.y} * kEntrySteps;
  const int64_t last = min(first + kEntrySteps, CeilDiv(shape.k, kStepK));
  const uint16_t* next[2] = {values, values};
  if (live) {
    const uint32_t* entry = entries + (strip * shape.entries() + blockIdx.y) * kEntryWords;
    const uint8_t* offsets = reinterpret_cast<const uint8_t*>(entry + 2);
    for (int stream = 0; stream < 2; ++stream) {
      const int64_t word = int64_t{entry[0]} * kSegmentWords + offsets[stream * kLanes + lane];
      next[stream] = values + 2 * (word * kLanes + lane) + stream;
    }
  }
  for (int64_t step = first; step < last; ++step) {
    uint32_t word = 0;
    if (live) {
      word = bitmap[((strip * shape.groups() + step / kGroupSteps) * kLanes + lane) * kGroupSteps +
                    step % kGroupSteps];
    }
#pragma unroll
    for (int stream = 0; stream < 2; ++stream) {
#pragma unroll
      for (int i = 0; i < kStreamPositions; ++i) {
        uint16_t v = 0;
        if ((word >> PositionBit(stream, i)) & 1) {
          v = *next[stream];
          next[stream] += 2 * kLanes;
        }
        tile[PositionColumn(t, i) * kRowStride + warp * kStripRows + 8 * stream + g] = v;
      }
    }
    __syncthreads();
    for (int column = warp; column < kStepK; column += kUnpackWarps) {
      const int64_t k = step * kStepK + column;
      if (k >= shape.k) break;
      const uint16_t* source = tile + column * kRowStride;
      uint16_t* out = dense + k * shape.m + m0;
      if (m0 + kUnpackRows <= shape.m && shape.m % 2 == 0) {
        const uint32_t* source2 = reinterpret_cast<const uint32_t*>(source);
        uint32_t* out2 = reinterpret_cast<uint32_t*>(out);
        for (int i = lane; i < kUnpackRows / 2; i += kLanes) out2[i] = source2[i];
      } else {
        for (int i = lane; i < kUnpackRows && m0 + i < shape.m; i += kLanes) out[i] = source[i];
      }
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t LaunchLscdUnpack(const uint32_t* bitmap, const uint32_t* entries,
                             const uint32_t* values, int64_t m, int64_t k, uint16_t* dense,
                             cudaStream_t stream) {
  const LscdShape shape{m, k};
  if (m == 0 || k == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(m, kUnpackRows)),
                  static_cast<unsigned>(shape.entries()));
  UnpackKernel<<<grid, kUnpackWarps * kLanes, 0, stream>>>(
      bitmap, entries, reinterpret_cast<const uint16_t*>(values), shape, dense);
  return cudaGetLastError();
}

}  // namespace flashjax
