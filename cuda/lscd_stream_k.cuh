// Persistent stream-K (Osama et al., PPoPP 2023): every rank, which is a CTA or a cluster of them,
// takes an equal share of all (tile, k-group) units, so that any shape fills the GPU, and tiles cut
// between ranks are summed in a fixed order.
//
// A tile's owner is the rank that holds its first group; it works on that tile last of its share.
// The others write their part to the workspace and raise a flag per warp; each begins with that
// tile, so that the owner hardly waits. Ranks run against blockIdx.x: an owner waits only for CTAs
// with smaller blockIdx.x, which the GPU starts first, so that it never waits for one that cannot
// start.
//
// Where a walk (lscd_strip_reader.cuh) goes through several tiles, a warp's strips in consecutive
// tiles are consecutive: a warp has one walk, whatever tiles its CTA passes. Else tiles may also
// differ in their columns, which come first (those of a band, as many as leave x in L2), and where
// there are many only the first ones are cut (the paper's hybrid): ranks that begin whole tiles
// together stay together, and find in L2 what another one has just read of x or W.
//
// The workspace: float4 partials[slots][warps][kTileN / 8][32 lanes], one slot a rank, then uint64
// flags[slots][warps]. A raised flag is a number that no other launch has (`ticket`), and the owner
// takes it down again: whatever the workspace held before, it need not be cleared, which would cost
// a launch. Uninitialised memory holds 64 random bits by chance once in 2^64.
#ifndef FLASHJAX_CUDA_LSCD_STREAM_K_CUH_
#define FLASHJAX_CUDA_LSCD_STREAM_K_CUH_

#include <cstdint>

#include "cpu/ceil_div.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/lscd_decode.cuh"

namespace flashjax {

struct Output {
  Epilogue epilogue;
  int n;
  uint64_t* flags;
  uint64_t ticket;
  float4* partials;
  bool in_boxes;  // y by a tensor map, where a kernel has that (lscd_box_store.cuh)
};

// Division by a number that the host knows, without the latency of the device's (Granlund and
// Montgomery 1994). For numerators below 2^31.
struct Divisor {
  uint32_t magic;
  int shift;

  explicit Divisor(uint32_t d) : magic(1), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    magic += static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d);
  }
  __device__ int Divide(int n) const {
    const uint32_t u = static_cast<uint32_t>(n);
    return static_cast<int>((static_cast<uint32_t>((uint64_t{magic} * u) >> 32) + u) >> shift);
  }
};

// Where a tile is.
struct Place {
  int row_tile, column_tile;
};

// How the ranks share the tiles. The first `cut_tiles` are cut, into units of a group; of the
// others a rank has whole ones. Of what is to be done for the former a rank has `each`, the first
// `extra` one more: of the units, or, where changes of tile count, of quarters of a unit's time. A
// tile then begins with `change` quarters for what a rank does besides where it goes on to another
// tile, and a cut falls on the unit that it is in.
struct StreamKPlan {
  static constexpr int kQuarters = 4;
  int row_tiles, column_tiles, tiles, band, cut_tiles, groups;
  int change, tile_work, each, extra;
  Divisor by_groups, by_tile_work, by_band_tiles, by_band, by_last_band;

  // There is no more work than an int holds, and at most `most_in_band` columns of tiles a band.
  StreamKPlan(int64_t rows, int64_t columns, int64_t most_in_band, int64_t groups_of_k,
              int64_t ranks, bool cuts_all, int change_quarters)
      : row_tiles(static_cast<int>(rows)),
        column_tiles(static_cast<int>(columns)),
        tiles(row_tiles * column_tiles),
        band(static_cast<int>(CeilDiv(columns, CeilDiv(columns, most_in_band)))),
        cut_tiles(cuts_all ? tiles : CutTiles(tiles, column_tiles, static_cast<int>(ranks))),
        groups(static_cast<int>(groups_of_k)),
        // With fewer tiles than ranks an owner waits for ranks that do not change tiles, which must
        // not have more to do; and equal shares of whole units more often end where a tile does.
        change(cut_tiles >= ranks ? change_quarters : 0),
        tile_work(change > 0 ? kQuarters * groups + change : groups),
        each(static_cast<int>(int64_t{cut_tiles} * tile_work / ranks)),
        extra(static_cast<int>(int64_t{cut_tiles} * tile_work % ranks)),
        by_groups(static_cast<uint32_t>(groups)),
        by_tile_work(static_cast<uint32_t>(tile_work)),
        by_band_tiles(static_cast<uint32_t>(band * row_tiles)),
        by_band(static_cast<uint32_t>(band)),
        by_last_band(static_cast<uint32_t>((column_tiles - 1) % band + 1)) {}

  __device__ Place PlaceOf(int tile) const {
    const int first = by_band_tiles.Divide(tile) * band, in_band = tile - first * row_tiles;
    const bool is_last = first + band >= column_tiles;
    const int row = (is_last ? by_last_band : by_band).Divide(in_band);
    return {row, first + in_band - row * (is_last ? column_tiles - first : band)};
  }

  // The first unit of a rank's share of the tiles that are cut.
  template <bool kCountsChanges>
  __device__ int Begin(int rank) const {
    const int work = rank * each + min(rank, extra);
    if constexpr (!kCountsChanges) return work;
    const int tile = by_tile_work.Divide(work);
    const int in_tile = max(0, work - tile * tile_work - change);
    return tile * groups + (change > 0 ? in_tile / kQuarters : in_tile);
  }

  // What is left over when every rank has as many whole tiles; and one tile a rank more if that is
  // so little that an owner would have many parts to add up, or if no other tile has the same W.
  static int CutTiles(int tiles, int column_tiles, int ranks) {
    const int rest = tiles % ranks;
    const bool cuts_rest_only = rest * 4 >= ranks && column_tiles > 1;
    return tiles < ranks || rest == 0 || cuts_rest_only ? rest : ranks + rest;
  }
};

// What a rank does next: groups [group0, group1) of a tile.
struct Piece {
  int tile, group0, group1;
  __device__ int size() const { return group1 - group0; }
};

// A rank's pieces. It is a CTA, or a cluster of them.
template <int kStrips, bool kWalksOn, int kCluster = 1, bool kCountsChanges = false>
struct Share {
  const StreamKPlan& plan;
  int rank;

  __device__ explicit Share(const StreamKPlan& plan)
      : plan(plan), rank((gridDim.x - 1 - blockIdx.x) / kCluster) {}

  __device__ Piece First() const { return At(Begin(rank)); }
  __device__ bool Has(const Piece& piece) const { return piece.tile < plan.tiles; }
  __device__ Piece Next(const Piece& piece) const {
    if (!kWalksOn && piece.tile >= plan.cut_tiles) return Whole(piece.tile + gridDim.x / kCluster);
    return At(piece.tile * plan.groups + piece.group1);
  }

  // A rank's units of the tiles that are cut: [Begin(rank), Begin(rank + 1)).
  __device__ int Begin(int r) const { return plan.Begin<kCountsChanges>(r); }
  __device__ int ColumnTile(int tile) const {
    return kWalksOn ? 0 : plan.PlaceOf(tile).column_tile;
  }
  __device__ int Strip(int tile, int warp) const {
    return kWalksOn ? warp * plan.row_tiles + tile : plan.PlaceOf(tile).row_tile * kStrips + warp;
  }
  // Begins a warp's walk: through a piece, or from it to the last one.
  template <typename Reader>
  __device__ void BeginWalk(Reader& reader, int warp, const Piece& piece) const {
    Piece last = piece;
    if (kWalksOn) {
      const int end = Begin(rank + 1);
      last.tile = plan.by_groups.Divide(end - 1);
      last.group1 = end - last.tile * plan.groups;
    }
    reader.Begin(Strip(piece.tile, warp), piece.group0, Strip(last.tile, warp), last.group1);
  }

 private:
  __device__ Piece Whole(int tile) const { return {tile, 0, plan.groups}; }
  __device__ Piece At(int unit) const {
    const int end = Begin(rank + 1);
    if (unit >= end) return Whole(kWalksOn ? plan.tiles : plan.cut_tiles + rank);
    const int tile = plan.by_groups.Divide(unit), group = unit - tile * plan.groups;
    return {tile, group, min(plan.groups, group + end - unit)};
  }
};

template <typename T>
__device__ __forceinline__ float Bias(const Output& out, const PackedWeight& w, int row) {
  return row < w.m ? LoadBias<T>(out.epilogue, w.layer, row) : 0.0f;
}

// Writes a warp's 16 x kTileN accumulators, of columns from `column` on: of each 8 columns and half
// of the rows a lane has, in mma.m16n8k16's layout, row lane / 4 and columns 2 (lane % 4) and the
// next.
template <int kTileN>
__device__ __forceinline__ void StoreFloats(const float* acc, const float bias[2],
                                            const Output& out, int m, int strip, int column,
                                            int lane) {
  const int row = strip * kStripRows + lane / 4, first = column + 2 * (lane % 4);
  float* y = static_cast<float*>(out.epilogue.y) + int64_t{first} * m + row;
#pragma unroll
  for (int j = 0; j < kTileN / 8; ++j, y += int64_t{8} * m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * j + first + i % 2 < out.n && row + i / 2 * 8 < m) {
        y[int64_t{i % 2} * m + i / 2 * 8] = acc[4 * j + i] + bias[i / 2];
      }
    }
  }
}

// Of four neighbouring lanes with four words each, lane i gets word i of every lane, in order.
__device__ __forceinline__ void TransposeWords(uint32_t v[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& low = v[i * (3 - distance)];
      uint32_t& high = v[i * (3 - distance) + distance];
      const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
      if (upper)
        low = other;
      else
        high = other;
    }
  }
}

// The same, rounded. Rows are contiguous in y: transposed, a lane has two that are neighbours, and
// of two parts of 8 columns eight: a warp writes 32 bytes of 16 columns at once.
template <typename T, int kTileN>
__device__ __forceinline__ void StoreHalves(const float* acc, const float bias[2],
                                            const Output& out, int m, int strip, int column,
                                            int lane) {
  constexpr int kParts = kTileN / 8;  // of 8 columns, stored in pairs and perhaps a last one
  uint16_t* y = static_cast<uint16_t*>(out.epilogue.y);
  const bool aligned = m % 8 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
#pragma unroll
  for (int j = 0; j < kParts; j += 2) {
    const int words = j + 1 < kParts ? 4 : 2;
    uint32_t v[4] = {};
#pragma unroll
    for (int i = 0; i < words; ++i) {
      const float* two = acc + 4 * j + 2 * i;
      v[i] = TransposeMatrix(Round2(T{}, two[0] + bias[i % 2], two[1] + bias[i % 2]));
    }
    if (words == 4 && aligned) {
      TransposeWords(v, lane);
      const int n = column + 8 * (j + lane % 4 / 2) + lane / 4;
      const int row = strip * kStripRows + 8 * (lane % 2);
      if (n < out.n && row < m) {
        *reinterpret_cast<uint4*>(y + int64_t{n} * m + row) = make_uint4(v[0], v[1], v[2], v[3]);
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < words; ++i) {
      const int n = column + 8 * (j + i / 2) + lane / 4;
      const int row = strip * kStripRows + 8 * (i % 2) + 2 * (lane % 4);
      if (n >= out.n || row >= m) continue;
      uint16_t* to = y + int64_t{n} * m + row;
      if (m % 2 == 0) {  // then every pair is aligned, as y is
        *reinterpret_cast<uint32_t*>(to) = v[i];
      } else {
        to[0] = static_cast<uint16_t>(v[i]);
        if (row + 1 < m) to[1] = static_cast<uint16_t>(v[i] >> 16);
      }
    }
  }
}

// Where a rank's warp leaves its part of a tile: float4 [kTileN / 8][32 lanes].
template <int kWarps, int kTileN>
__device__ __forceinline__ float4* PartialSums(const Output& out, int rank, int warp) {
  return out.partials + (int64_t{rank} * kWarps + warp) * (kTileN / 8) * kLanes;
}

// A warp leaves its part of a tile to the tile's owner. It counts when the flag is raised.
template <int kWarps, int kTileN>
__device__ __forceinline__ void LeavePart(const float* acc, const Output& out, int rank, int warp,
                                          int lane) {
  const float4* sums = reinterpret_cast<const float4*>(acc);
  float4* mine = PartialSums<kWarps, kTileN>(out, rank, warp) + lane;
#pragma unroll
  for (int i = 0; i < kTileN / 8; ++i) __stcg(mine + i * kLanes, sums[i]);
}

// By one thread, ordered after the warp's stores.
template <int kWarps>
__device__ __forceinline__ void RaiseFlag(const Output& out, int rank, int warp) {
  StoreRelease(out.flags + rank * kWarps + warp, out.ticket);
}

// The owner of a tile adds what others have left.
template <int kWarps, int kTileN, typename Share>
__device__ __forceinline__ void AddParts(float* acc, const Output& out, const Share& share,
                                         int tile, int warp, int lane) {
  float4* sums = reinterpret_cast<float4*>(acc);
  const int tile_end = (tile + 1) * share.plan.groups;
  int end = share.rank + 1;
  while (share.Begin(end) < tile_end) ++end;
  // A lane a flag, with a uniform branch: divergent control flow here would cost the main loop its
  // uniform registers.
  for (int first = share.rank + 1; first < end; first += kLanes) {
    uint64_t* flag = out.flags + min(first + lane, end - 1) * kWarps + warp;
    while (!__all_sync(0xffffffffu, LoadAcquire(flag) == out.ticket)) {
    }
    __syncwarp();  // orders what a lane has seen before the loads of the others
    *flag = 0;
  }
  constexpr int kParts = kTileN / 8;
  constexpr int kInFlight = kParts <= 2 ? 4 : kParts <= 8 ? 2 : 1;  // ranks whose loads overlap
#pragma unroll kInFlight
  for (int rank = share.rank + 1; rank < end; ++rank) {
    const float4* other = PartialSums<kWarps, kTileN>(out, rank, warp) + lane;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const float4 v = __ldcg(other + i * kLanes);
      sums[i].x += v.x;
      sums[i].y += v.y;
      sums[i].z += v.z;
      sums[i].w += v.w;
    }
  }
}

// Writes a warp's sums of a tile.
template <typename T, int kTileN>
__device__ __forceinline__ void StoreStrip(const float* acc, const float bias[2], const Output& out,
                                           const PackedWeight& w, int strip, int column, int lane) {
  if (strip >= w.strips) return;
  if (out.epilogue.is_float) {
    StoreFloats<kTileN>(acc, bias, out, w.m, strip, column, lane);
  } else {
    StoreHalves<T, kTileN>(acc, bias, out, w.m, strip, column, lane);
  }
}

// Called by every warp with its accumulators of a piece. `left` is called by one lane when the warp
// has left a part for another rank: that the flag be raised. `store` is called with the sums of a
// tile that is done, what is still to be added to the two halves of its rows, its strip and its
// first column.
template <typename T, int kWarps, int kTileN, typename Share, typename Left, typename Store>
__device__ __forceinline__ void FinishPiece(float* acc, const Output& out, const PackedWeight& w,
                                            const Share& share, const Piece& piece, int warp,
                                            int lane, const Left& left, const Store& store) {
  if (piece.group0 > 0) {
    LeavePart<kWarps, kTileN>(acc, out, share.rank, warp, lane);
    __syncwarp();  // orders the other lanes' stores before what one lane does
    if (lane == 0) left();
    return;
  }
  if (piece.group1 < share.plan.groups) {
    AddParts<kWarps, kTileN>(acc, out, share, piece.tile, warp, lane);
  }
  const int strip = share.Strip(piece.tile, warp), row = strip * kStripRows + lane / 4;
  float bias[2] = {Bias<T>(out, w, row), Bias<T>(out, w, row + 8)};
  if (out.epilogue.has_relu) {
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i) acc[i] = Relu(acc[i] + bias[i / 2 % 2]);
    bias[0] = bias[1] = 0.0f;
  }
  store(acc, bias, strip, share.ColumnTile(piece.tile) * kTileN);
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_STREAM_K_CUH_
