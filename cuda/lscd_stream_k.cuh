// Persistent stream-K: every CTA takes an equal share of all (tile, k-group) units, so that any
// shape fills the GPU, and tiles cut between CTAs are summed in a fixed order.
//
// A tile's owner is the CTA that holds its first group; it works on that tile last. The others
// write their part to the workspace and raise a flag per warp; each begins with that tile, so that
// the owner hardly waits. Ranks run against blockIdx.x: an owner waits only for CTAs with smaller
// blockIdx.x, which the GPU starts first, so that it never waits for one that cannot start.
//
// Where a walk (lscd_strip_reader.cuh) goes through several tiles, a warp's strips in consecutive
// tiles are consecutive: a warp has one walk, whatever tiles its CTA passes.
//
// The workspace: float4 partials[slots][warps][kTileN / 8][32 lanes], one slot a rank, then uint64
// flags[slots][warps]. A raised flag is a number that no other launch has (`ticket`), and the owner
// takes it down again: whatever the workspace held before, it need not be cleared, which would cost
// a launch. Uninitialised memory holds 64 random bits by chance once in 2^64.
#ifndef FLASHJAX_CUDA_LSCD_STREAM_K_CUH_
#define FLASHJAX_CUDA_LSCD_STREAM_K_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common/ptx.cuh"
#include "cuda/lscd_decode.cuh"

namespace flashjax {

struct Output {
  void* y;            // (n, m), row-major
  const float* bias;  // (m,) or nullptr
  int n;
  bool is_float;  // y is float32 instead of the weight's type
  uint64_t* flags;
  uint64_t ticket;
  float4* partials;
};

// A CTA's units [begin, end) of tiles x groups.
template <int kStrips, bool kWalksOn>
struct Share {
  int tiles;
  int groups;
  int units;
  int rank;

  __device__ explicit Share(const PackedWeight& w)
      : tiles((w.strips + kStrips - 1) / kStrips),
        groups(w.groups),
        units(tiles * groups),
        rank(gridDim.x - 1 - blockIdx.x) {}

  // The launcher keeps units * gridDim.x below 2^31.
  __device__ int Begin(int r) const { return units * r / static_cast<int>(gridDim.x); }
  __device__ int Strip(int tile, int warp) const {
    return kWalksOn ? warp * tiles + tile : tile * kStrips + warp;
  }
  // Begins a warp's walk over units, of one tile or, if it walks on, of several.
  template <typename Reader>
  __device__ void BeginWalk(Reader& reader, int warp, int unit, int end) const {
    const int tile0 = unit / groups, tile1 = (end - 1) / groups;
    reader.Begin(Strip(tile0, warp), unit - tile0 * groups, Strip(tile1, warp),
                 end - tile1 * groups);
  }
};

// What a CTA does next: groups [group0, group1) of a tile.
struct Piece {
  int tile, group0, group1;

  template <typename Share>
  __device__ Piece(const Share& share, int unit, int end)
      : tile(unit / share.groups),
        group0(unit - tile * share.groups),
        group1(min(share.groups, group0 + end - unit)) {}
  __device__ int size() const { return group1 - group0; }
};

__device__ __forceinline__ void Store(__half* y, float v) { *y = __float2half_rn(v); }
__device__ __forceinline__ void Store(__nv_bfloat16* y, float v) { *y = __float2bfloat16_rn(v); }
__device__ __forceinline__ void Store(float* y, float v) { *y = v; }

// Writes a warp's 16 x kTileN accumulators in mma.m16n8k16's layout.
template <int kTileN, typename Y>
__device__ __forceinline__ void StoreStrip(const float* acc, const Output& out, int m, int strip,
                                           int lane) {
  Y* y = static_cast<Y*>(out.y);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = strip * kStripRows + half * 8 + lane / 4;
    if (row >= m) continue;
    const float bias = out.bias == nullptr ? 0.0f : out.bias[row];
#pragma unroll
    for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = 8 * j + 2 * (lane % 4) + i;
        if (n < out.n) Store(y + int64_t{n} * m + row, acc[4 * j + 2 * half + i] + bias);
      }
    }
  }
}

// Called by every warp with its accumulators of a piece.
template <typename T, int kWarps, int kTileN, typename Share>
__device__ __forceinline__ void FinishPiece(float* acc, const Output& out, const PackedWeight& w,
                                            const Share& share, const Piece& piece, int warp,
                                            int lane) {
  const int strip = share.Strip(piece.tile, warp);
  if (strip >= w.strips) return;
  constexpr int kParts = kTileN / 8;
  float4* sums = reinterpret_cast<float4*>(acc);
  auto slot = [&](int rank) {
    return out.partials + (int64_t{rank} * kWarps + warp) * kParts * kLanes + lane;
  };
  if (piece.group0 > 0) {
    float4* mine = slot(share.rank);
#pragma unroll
    for (int i = 0; i < kParts; ++i) __stcg(mine + i * kLanes, sums[i]);
    __syncwarp();  // orders the other lanes' stores before the release
    if (lane == 0) StoreRelease(out.flags + share.rank * kWarps + warp, out.ticket);
    return;
  }
  const int tile_end = (piece.tile + 1) * share.groups;
  int end = share.rank + 1;
  while (share.Begin(end) < tile_end) ++end;
  // A lane a flag, with a uniform branch: divergent control flow here would cost the main loop its
  // uniform registers.
  for (int first = share.rank + 1; first < end; first += kLanes) {
    uint64_t* flag = out.flags + min(first + lane, end - 1) * kWarps + warp;
    while (!__all_sync(0xffffffffu, LoadAcquire(flag) == out.ticket)) {
    }
    *flag = 0;
  }
  constexpr int kInFlight = kParts <= 2 ? 4 : kParts <= 8 ? 2 : 1;  // ranks whose loads overlap
#pragma unroll kInFlight
  for (int rank = share.rank + 1; rank < end; ++rank) {
    const float4* other = slot(rank);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const float4 v = __ldcg(other + i * kLanes);
      sums[i].x += v.x;
      sums[i].y += v.y;
      sums[i].z += v.z;
      sums[i].w += v.w;
    }
  }
  if (out.is_float) {
    StoreStrip<kTileN, float>(acc, out, w.m, strip, lane);
  } else {
    StoreStrip<kTileN, T>(acc, out, w.m, strip, lane);
  }
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_STREAM_K_CUH_
