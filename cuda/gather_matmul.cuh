// y = x W^T + bias for a W in the gather layout (cpu/gather_layout.h) and up to 8 rows of x.
//
// No tensor cores: a lane is a row of W, and every nonzero is multiplied by the 8 values of x of
// its column, one 16-byte load from shared memory, with float32 sums in registers. A cluster owns
// some strips, and each of its CTAs a panel of their units, so that it holds only that part of x.
// Its warps share the panel's units evenly; a warp's sums of a strip go to shared memory, and when
// all CTAs are done each adds up those of some strips, in a fixed order, from the whole cluster.
//
// docs/kernel-log.md, section 12, has the measurements.
#ifndef FLASHJAX_CUDA_GATHER_MATMUL_CUH_
#define FLASHJAX_CUDA_GATHER_MATMUL_CUH_

#include <cstdint>

#include "cpu/gather_layout.h"
#include "cuda/common/cluster.cuh"
#include "cuda/common/floats.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gather_weight.cuh"

namespace flashjax::gather {

inline constexpr int kMinWarps = 24, kMaxWarps = 32;
inline constexpr int kMaxStrips = 32;  // of a cluster
inline constexpr int kAhead = 2;       // chunks whose loads are under way
inline constexpr int kColumnBytes = kTokens * 2;
inline constexpr int kSumBytes = kLanes * kTokens * 4;  // of a warp for a strip
inline constexpr int kXBytes = kPanelColumns * kColumnBytes;
inline constexpr int kSharedBytes = kXBytes + (kMaxWarps + kMaxStrips) * kSumBytes;

struct GatherProduct {
  PackedGather packed;
  const uint16_t* x;
  Epilogue epilogue;
  int n, m, k;
  int strips_per_cluster;
};

// Adds a chunk's products to the sums; `column` is the address of the column of the value before.
template <typename T>
__device__ __forceinline__ void Multiply(const Chunk& chunk, uint32_t& column,
                                         float sums[kTokens]) {
  const uint32_t values[4] = {chunk.values.x, chunk.values.y, chunk.values.z, chunk.values.w};
#pragma unroll
  for (int i = 0; i < kChunkValues; ++i) {
    const int bytes = static_cast<int>(i < 4 ? chunk.columns.x : chunk.columns.y);
    column = static_cast<uint32_t>(
        __dp4a(bytes, kColumnBytes << (8 * (i % 4)), static_cast<int>(column)));
    const uint4 x = LoadShared16(column);
    const float2 pair = ToFloat2<T>(values[i / 2]);
    const float w = i % 2 == 0 ? pair.x : pair.y;
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j) {
      const float2 v = ToFloat2<T>(xs[j]);
      sums[2 * j] = fmaf(w, v.x, sums[2 * j]);
      sums[2 * j + 1] = fmaf(w, v.y, sums[2 * j + 1]);
    }
  }
}

// A lane's way through consecutive chunks, with the loads of those ahead under way.
struct Walk {
  const uint4* values;  // of the first chunk in `ahead`
  const uint2* columns;
  uint32_t column;  // address of the column of the value before
  int left;         // chunks
  Chunk ahead[kAhead];

  __device__ __forceinline__ void Load(int i) {
    ahead[i] = {LoadStreaming(values + i * kLanes), LoadStreaming(columns + i * kLanes)};
  }

  __device__ __forceinline__ void Fill() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < left) Load(i);
    }
  }

  template <typename T>
  __device__ __forceinline__ void MultiplyAll(float sums[kTokens]) {
    for (; left > 0; left -= kAhead) {
      values += kAhead * kLanes;
      columns += kAhead * kLanes;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i < left) {
          Multiply<T>(ahead[i], column, sums);
          if (i + kAhead < left) Load(i);
        }
      }
    }
  }
};

// Copies columns [begin, end) of x to shared memory, as [column][8 rows], rows beyond n as zeros.
// A thread takes two columns; half of the threads store them the other way round, because 16-byte
// stores of 8 lanes to every second column would conflict.
__device__ __forceinline__ void LoadX(const GatherProduct& p, int begin, int end, uint32_t shared) {
  constexpr int kPairs = 2;  // whose loads are under way
  const int pairs = (end - begin) / 2, threads = static_cast<int>(blockDim.x);
  const bool swapped = (threadIdx.x / 4) % 2 == 1;
  const uint32_t first = swapped ? 0x7632u : 0x5410u, second = swapped ? 0x5410u : 0x7632u;
  for (int i0 = threadIdx.x; i0 < pairs; i0 += kPairs * threads) {
    uint32_t rows[kPairs][kTokens];
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      const int i = i0 + u * threads;
#pragma unroll
      for (int n = 0; n < kTokens; ++n) {
        const uint16_t* from = p.x + int64_t{n} * p.k + begin + 2 * i;
        rows[u][n] = i < pairs && n < p.n ? *reinterpret_cast<const uint32_t*>(from) : 0u;
      }
    }
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      const int i = i0 + u * threads;
      if (i >= pairs) break;
      uint32_t a[4], b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[j] = __byte_perm(rows[u][2 * j], rows[u][2 * j + 1], first);
        b[j] = __byte_perm(rows[u][2 * j], rows[u][2 * j + 1], second);
      }
      const uint32_t to = shared + 2 * i * kColumnBytes;
      StoreShared16(to + (swapped ? kColumnBytes : 0), {a[0], a[1], a[2], a[3]});
      StoreShared16(to + (swapped ? 0 : kColumnBytes), {b[0], b[1], b[2], b[3]});
    }
  }
}

// Units that the warps of a CTA share evenly, in order. There are at least as many units as warps
// among which they are shared.
struct Shares {
  int units, warps;

  __device__ __forceinline__ Shares(int units, int all_warps)
      : units(units), warps(min(units, all_warps)) {}

  __device__ __forceinline__ int First(int warp) const { return units * min(warp, warps) / warps; }
  __device__ __forceinline__ int WarpOf(int unit) const { return ((unit + 1) * warps - 1) / units; }
};

// A cluster's strips are counted from its first one here, its units over all of them. The sums of a
// warp for a strip are at index warp + strip: the pairs that exist are on a path on which one or
// both grow.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 1)
    GatherKernel(const __grid_constant__ GatherProduct p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int lane = LaneId(), warp = threadIdx.x / kLanes;
  const GatherWeight w = Select(p.packed);
  const int panel = blockIdx.x % w.panels;
  const int first_strip = blockIdx.x / w.panels * p.strips_per_cluster;
  const int strips = min(p.strips_per_cluster, w.strips - first_strip);
  const Shares shares(strips * kPanelUnits, static_cast<int>(blockDim.x) / kLanes);

  uint8_t* shared = DynamicShared();
  auto* sums_of = reinterpret_cast<float4*>(shared + kXBytes);
  const int2 window = w.window(panel, p.k);
  const uint32_t x_address = SharedAddress(shared);

  int unit = shares.First(warp);
  const int end = shares.First(warp + 1);
  Walk walk;
  const auto begin = [&] {
    const int strip = unit / kPanelUnits, stop = min(end, (strip + 1) * kPanelUnits);
    const int skipped = (panel - strip) * kPanelUnits;  // from the panel's units to the strip's
    const StripEntry e = w.entry(first_strip + strip);
    const int chunk = e.chunk(), chunks = w.entry(first_strip + strip + 1).chunk() - chunk;
    const int first = UnitChunk(unit + skipped, chunks, w.panels);
    walk.left = UnitChunk(stop + skipped, chunks, w.panels) - first;
    walk.column = x_address + (e.column(unit + skipped, lane) - window.x) * kColumnBytes;
    walk.values = w.values + (int64_t{chunk} + first) * kLanes + lane;
    walk.columns = w.columns + (int64_t{chunk} + first) * kLanes + lane;
    walk.Fill();
  };
  if (unit < end) begin();  // before x, which takes as long
  // What the thread will finish: of strips `panel`, `panel` + panels, ... one, for 4 rows of x.
  const int own = panel + threadIdx.x / (2 * kLanes) * w.panels, half = threadIdx.x / kLanes % 2;
  const uint32_t row = own < strips ? w.entry(first_strip + own).row(lane) : p.m;
  const bool owns = row < static_cast<uint32_t>(p.m);
  const float bias = owns ? LoadBias<T>(p.epilogue, w.layer, static_cast<int>(row)) : 0.0f;
  LoadX(p, window.x, window.y, x_address);
  __syncthreads();

  while (unit < end) {
    float sums[kTokens] = {};
    walk.MultiplyAll<T>(sums);
    const int strip = unit / kPanelUnits;
    float4* out = sums_of + (warp + strip) * (kSumBytes / sizeof(float4)) + lane;
    out[0] = {sums[0], sums[1], sums[2], sums[3]};
    out[kLanes] = {sums[4], sums[5], sums[6], sums[7]};
    unit = min(end, (strip + 1) * kPanelUnits);
    if (unit < end) begin();
  }
  ClusterArrive();
  ClusterWait();

  float4 total = {0, 0, 0, 0};
  if (owns) {
    const int first_warp = shares.WarpOf(own * kPanelUnits);
    const int last_warp = shares.WarpOf((own + 1) * kPanelUnits - 1);
    for (int rank = 0; rank < w.panels; ++rank) {
      const float4* from = InCluster(sums_of, rank) + half * kLanes + lane;
      for (int i = first_warp; i <= last_warp; ++i) {
        const float4 part = from[(i + own) * (kSumBytes / sizeof(float4))];
        total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
      }
    }
  }
  ClusterArrive();  // nobody leaves while others read its sums
  if (owns) {
    const float results[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = 4 * half + j;
      const int64_t at = int64_t{n} * p.m + row;
      if (n >= p.n) break;
      float result = results[j] + bias;
      if (p.epilogue.has_relu) result = Relu(result);
      if (p.epilogue.is_float) {
        static_cast<float*>(p.epilogue.y)[at] = result;
      } else {
        static_cast<T*>(p.epilogue.y)[at] = FromFloat<T>(result);
      }
    }
  }
  ClusterWait();
#else
  __trap();
#endif
}

}  // namespace flashjax::gather

#endif  // FLASHJAX_CUDA_GATHER_MATMUL_CUH_
