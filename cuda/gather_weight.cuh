// Reading the gather layout (cpu/gather_layout.h).
#ifndef FLASHJAX_CUDA_GATHER_WEIGHT_CUH_
#define FLASHJAX_CUDA_GATHER_WEIGHT_CUH_

#include <cstdint>

#include "cpu/gather_layout.h"
#include "cuda/common/ptx.cuh"
#include "cuda/gather_packed_args.h"

namespace flashjax::gather {

// 8 values of a lane and their columns.
struct Chunk {
  uint4 values;
  uint2 columns;
};

// A strip's lanes, in order: which row each is, and where the strip's units begin.
struct StripEntry {
  const uint32_t* words;

  __device__ __forceinline__ int chunk() const { return static_cast<int>(words[0]); }
  // M and beyond for a lane without a row.
  __device__ __forceinline__ uint32_t row(int lane) const { return words[1 + lane]; }
  __device__ __forceinline__ int column(int unit, int lane) const {
    return reinterpret_cast<const uint16_t*>(words + 1 + kLanes)[unit * kLanes + lane];
  }
};

// W as the kernels see it: one matrix, also of a stack.
struct GatherWeight {
  const uint32_t* entries;
  const uint4* values;
  const uint2* columns;
  int strips, panels, entry_words;
  int layer;  // of the stack that it is one of, or 0

  __device__ __forceinline__ StripEntry entry(int strip) const {
    return {entries + int64_t{strip} * entry_words};
  }
  // Columns [x, y) that a panel's units point to, at most k and as many as a CTA holds.
  __device__ __forceinline__ int2 window(int panel, int k) const {
    const uint32_t* words = entry(strips).words + 1 + 2 * panel;
    const int begin = static_cast<int>(min(words[0], static_cast<uint32_t>(k)));
    const int end = static_cast<int>(min(words[1], static_cast<uint32_t>(k)));
    return {begin, min(end, begin + kPanelColumns)};
  }
};

struct PackedGather {
  GatherPackedArgs packed;
  int strips, panels, entry_words;
};

inline PackedGather MakePackedGather(const GatherPackedArgs& packed, const GatherShape& shape) {
  return {packed, static_cast<int>(shape.strips()), shape.panels(),
          static_cast<int>(shape.entry_words())};
}

// An index out of range means the nearest matrix, as for JAX's dynamic slices.
__device__ __forceinline__ GatherWeight Select(const PackedGather& p) {
  GatherWeight w{p.packed.entries,
                 reinterpret_cast<const uint4*>(p.packed.values),
                 reinterpret_cast<const uint2*>(p.packed.bitmap),
                 p.strips,
                 p.panels,
                 p.entry_words,
                 0};
  if (p.packed.layer != nullptr) {
    w.layer = max(0, min(*p.packed.layer, static_cast<int>(p.packed.layers) - 1));
    w.entries += int64_t{w.layer} * (p.strips + 1) * p.entry_words;
    w.values += w.layer * p.packed.chunks * kLanes;
    w.columns += w.layer * p.packed.chunks * kLanes;
  }
  return w;
}

// The first of a strip's chunks that belongs to one of its units.
__device__ __forceinline__ int UnitChunk(int unit, int chunks, int panels) {
  return (chunks * unit) >> (__ffs(panels * kPanelUnits) - 1);
}

}  // namespace flashjax::gather

#endif  // FLASHJAX_CUDA_GATHER_WEIGHT_CUH_
