// The packer on the GPU: a warp a chain, a lane the two streams that it will consume.
#ifndef FLASHJAX_CUDA_LSCD_PACK_CUH_
#define FLASHJAX_CUDA_LSCD_PACK_CUH_

#include <cstdint>

#include "cpu/lscd_layout.h"

namespace flashjax {

inline constexpr uint32_t kAllLanes = 0xffffffffu;
inline constexpr int kTileStride = 24;  // uint16; 16-byte aligned rows of 16

// One step of a strip in shared memory: [64 k][16 rows].
struct StepTile {
  uint16_t v[kStepK * kTileStride];

  __device__ uint16_t At(int row, int column) const { return v[column * kTileStride + row]; }
};

struct Dense {
  const uint16_t* data;  // (k, m)
  int64_t m, k;
  bool aligned;  // rows of 16 can be read 16 bytes at a time

  __device__ void Load(StepTile& tile, int64_t strip, int64_t step, int lane) const {
    for (int column = lane; column < kStepK; column += kLanes) {
      const int64_t row = strip * kStripRows, k_index = step * kStepK + column;
      uint4* out = reinterpret_cast<uint4*>(tile.v + column * kTileStride);
      const uint16_t* source = data + k_index * m + row;
      if (k_index < k && row + kStripRows <= m && aligned) {
        out[0] = reinterpret_cast<const uint4*>(source)[0];
        out[1] = reinterpret_cast<const uint4*>(source)[1];
      } else {
        for (int i = 0; i < kStripRows; ++i) {
          tile.v[column * kTileStride + i] = k_index < k && row + i < m ? source[i] : 0;
        }
      }
    }
    __syncwarp();
  }
};

// The nonzeros of the lane's streams in a step, as a word of the bitmap. -0 counts as zero.
__device__ inline uint32_t Mask(const StepTile& tile, int lane) {
  const int g = lane / 4, t = lane % 4;
  uint32_t mask = 0;
#pragma unroll
  for (int stream = 0; stream < 2; ++stream) {
#pragma unroll
    for (int i = 0; i < kStreamPositions; ++i) {
      const uint32_t nonzero = (tile.At(g + 8 * stream, PositionColumn(t, i)) & 0x7fff) != 0;
      mask |= nonzero << PositionBit(stream, i);
    }
  }
  return mask;
}

// Marks the lowest unmarked positions of a stream until `count` are marked.
__device__ inline uint32_t Pad(uint32_t mask, int stream, int count) {
  int missing = count - __popc((mask >> (16 * stream)) & 0xffffu);
  for (int i = 0; i < kStreamPositions && missing > 0; ++i) {
    const uint32_t bit = 1u << PositionBit(stream, i);
    if (mask & bit) continue;
    mask |= bit;
    --missing;
  }
  return mask;
}

template <bool kWrite>
__global__ void __launch_bounds__(kLanes)
    PackKernel(const Dense dense, const LscdShape shape, uint32_t* chain_segments, uint32_t* bitmap,
               uint32_t* entries, uint16_t* values, uint32_t* counts) {
  __shared__ __align__(16) StepTile tiles[2];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const int64_t chain = blockIdx.x, steps = shape.steps();
  const int64_t first_strip = chain * shape.chain_strips();
  const int64_t strips = min(shape.chain_strips(), shape.strips() - first_strip);

  uint32_t base = 0;
  if (kWrite) {
    for (int64_t i = lane; i < chain; i += kLanes) base += chain_segments[i];
    base = __reduce_add_sync(kAllLanes, base);
  }

  int n0 = 0, n1 = 0;  // values stored so far in the lane's streams
  uint32_t resident = 0, schedule = 0, nonzeros = 0;
  dense.Load(tiles[0], first_strip, 0, lane);
  uint32_t mask = Mask(tiles[0], lane);
  const int64_t total = strips * steps;
  for (int64_t index = 0; index < total; ++index) {
    const int64_t strip = first_strip + index / steps, step = index % steps;
    const StepTile& tile = tiles[index % 2];
    uint32_t mask_ahead = 0;
    if (index + 1 < total) {
      StepTile& ahead = tiles[(index + 1) % 2];
      dense.Load(ahead, first_strip + (index + 1) / steps, (index + 1) % steps, lane);
      mask_ahead = Mask(ahead, lane);
    }
    // The padding rule of the layout.
    const int c0 = __popc(mask & 0xffffu), c1 = __popc(mask >> 16);
    const int most = __reduce_max_sync(
        kAllLanes, max(n0 + c0 + __popc(mask_ahead & 0xffffu), n1 + c1 + __popc(mask_ahead >> 16)));
    const int bound = kSegmentWords * ((most + kSegmentWords - 1) / kSegmentWords - shape.spread());
    uint32_t stored = mask;
    if (n0 + c0 < bound) stored = Pad(stored, 0, bound - n0);
    if (n1 + c1 < bound) stored = Pad(stored, 1, bound - n1);

    if (kWrite) {
      uint32_t* entry = entries + (strip * shape.entries() + step / kEntrySteps) * kEntryWords;
      if (step % kEntrySteps == 0) {
        const int least = __reduce_min_sync(kAllLanes, min(n0, n1)) / kSegmentWords;
        if (lane == 0) {
          entry[0] = base + least;
          entry[1] = resident - least;
        }
        uint8_t* offsets = reinterpret_cast<uint8_t*>(entry + 2);
        offsets[lane] = static_cast<uint8_t>(n0 - least * kSegmentWords);
        offsets[kLanes + lane] = static_cast<uint8_t>(n1 - least * kSegmentWords);
        schedule = 0;
      }
      bitmap[((strip * shape.groups() + step / kGroupSteps) * kLanes + lane) * kGroupSteps +
             step % kGroupSteps] = stored;
      int n = n0;
#pragma unroll
      for (int stream = 0; stream < 2; ++stream) {
#pragma unroll
        for (int i = 0; i < kStreamPositions; ++i) {
          const uint32_t bit = 1u << PositionBit(stream, i);
          if (!(stored & bit)) continue;
          const int64_t word = (int64_t{base} * kSegmentWords + n) * kLanes + lane;
          values[2 * word + stream] =
              mask & bit ? tile.At(g + 8 * stream, PositionColumn(t, i)) : 0;
          ++n;
        }
        n = n1;
      }
      nonzeros += __popc(mask);
      if (step + 1 == steps) {
        const uint32_t sum = __reduce_add_sync(kAllLanes, nonzeros);
        if (lane == 0) counts[strip] = sum;
        nonzeros = 0;
      }
    }
    n0 += __popc(stored & 0xffffu);
    n1 += __popc(stored >> 16);
    const uint32_t needed =
        (__reduce_max_sync(kAllLanes, max(n0, n1)) + kSegmentWords - 1) / kSegmentWords;
    if (kWrite) {
      schedule |= (needed - resident) << (step % kEntrySteps);
      if ((step % kEntrySteps == kEntrySteps - 1 || step + 1 == steps) && lane == 0) {
        entries[(strip * shape.entries() + step / kEntrySteps) * kEntryWords + 1] |= schedule << 16;
      }
    }
    resident = needed;
    mask = mask_ahead;
    __syncwarp();  // the tile may be overwritten
  }
  if (!kWrite && lane == 0) chain_segments[chain] = resident;
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_PACK_CUH_
