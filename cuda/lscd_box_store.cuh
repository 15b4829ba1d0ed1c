// Results through shared memory, by a tensor map (sm_90).
//
// A warp has 16 rows of y: it writes 32 bytes of a column at a time, and all warps of the GPU do so
// when a wave of tiles ends, while the tensor cores wait. A warpgroup has 128 bytes of a column;
// they leave shared memory while the next tile begins.
#ifndef FLASHJAX_CUDA_LSCD_BOX_STORE_CUH_
#define FLASHJAX_CUDA_LSCD_BOX_STORE_CUH_

#include <cuda.h>

#include <cstdint>

#include "cuda/common/mma.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/lscd_decode.cuh"

namespace flashjax {

inline constexpr int kBoxRows = 64;  // of y, in a warpgroup's four strips

// Of a warp. The warpgroup's shared memory is that in which its warps have their values: columns of
// 128 bytes, swizzled.
struct BoxStore {
  const CUtensorMap* y;
  uint32_t shared, barrier;  // the warpgroup's; the barrier counts its warps
  int warp, lane;            // warp: in the warpgroup
  uint32_t phase = 0;
  bool may_be_read = false;  // boxes, from shared memory

  // Of shared memory for so many columns, which are written by sixteen.
  static constexpr int Bytes(int columns) { return (columns + 15) / 16 * 16 * kBoxRows * 2; }

  // Rounds and stores a warp's sums. `row` and `column` are the first ones of the warpgroup.
  template <typename T, int kTileN, int kBoxN>
  __device__ __forceinline__ void Store(const float* acc, const float bias[2], int row,
                                        int column) {
    constexpr int kColumnBytes = kBoxRows * 2, kSecond = kTileN - kBoxN;
    static_assert(kSecond <= kBoxN && kSecond % 8 == 0);
    // Lane l gives the place of column l % 8 of the first or the second eight, and of 8 of the
    // warp's 16 rows.
    const uint32_t to = shared + (lane / 16 * 8 + lane % 8) * kColumnBytes +
                        ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
    Meet();  // nobody reads values any more
#pragma unroll
    for (int j = 0; j < kTileN / 8; j += 2) {
      uint32_t v[4] = {};
#pragma unroll
      for (int i = 0; i < (j + 1 < kTileN / 8 ? 4 : 2); ++i) {
        const float* two = acc + 4 * j + 2 * i;
        v[i] = Round2(T{}, two[0] + bias[i % 2], two[1] + bias[i % 2]);
      }
      StoreMatrix4Transposed(to + j * 8 * kColumnBytes, v);
    }
    CopiesSeeShared();
    Meet();
    if (warp == 0 && lane == 0) {
      TensorStore2d(y, row, column, shared);
      TensorStore2d(y, row, column + kSecond, shared + kSecond * kColumnBytes);
    }
    may_be_read = true;
  }

  // Until shared memory may be written again.
  __device__ __forceinline__ void WaitUntilRead() {
    if (!may_be_read) return;
    may_be_read = false;
    if (warp == 0 && lane == 0) WaitForStoreReads();
    Meet();
  }

 private:
  __device__ __forceinline__ void Meet() {
    __syncwarp();
    if (lane == 0) BarrierArrive(barrier);
    BarrierWait(barrier, phase);
    phase ^= 1;
  }
};

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_BOX_STORE_CUH_
