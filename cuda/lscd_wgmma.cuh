// y = x W^T on Hopper (sm_90a): packed weights are expanded into tensor-core A registers.
//
// A CTA is 16 consumer warps (four warpgroups), each with a strip of 16 rows, and a warpgroup of
// which one thread brings x and one warp raises flags (a whole one, because registers are given
// back by warpgroup). From 128 columns on it is 8 consumer warps: their accumulators leave room to
// decode further ahead, and half as many rows a tile means half as long a chain of partial sums on
// small matrices.
//
//   weights  values: 2 KB bulk copies into a ring a warp, completion on mbarriers;
//            bitmap and schedule: plain loads up to one group (256 k) ahead
//   x        the producer brings boxes of 64 k x kTileN by a tensor map (128-byte swizzle, zeros
//            beyond N and K) into a ring of stages that all warps share; from 256 columns on two
//            CTAs on top of each other bring half a box each, for both
//   product  wgmma: fragments are decoded into registers while the previous batch is multiplied.
//            Up to 8 columns mma.sync: there the warps of a warpgroup would spend a sixth of their
//            time waiting for each other. Up to 2 with a fragment B for a whole step
//   results  from 256 columns on through shared memory, in boxes (lscd_box_store.cuh)
//   balance  stream-K over tiles of 256 rows (128 with 128 columns; lscd_stream_k.cuh)
#ifndef FLASHJAX_CUDA_LSCD_WGMMA_CUH_
#define FLASHJAX_CUDA_LSCD_WGMMA_CUH_

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/cluster.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/lscd_box_store.cuh"
#include "cuda/lscd_bulk_ring.cuh"
#include "cuda/lscd_stream_k.cuh"
#include "cuda/lscd_strip_reader.cuh"

namespace flashjax {

template <int kTileN>
struct WgmmaConfig {
  static constexpr bool kUsesMma = kTileN <= 8;
  static constexpr int kColumns = kTileN < 8 ? 8 : kTileN;  // of x in shared memory and of sums
  static constexpr int kWarps = kTileN < 128 ? 16 : 8;
  static constexpr int kThreads = (kWarps + 4) * 32;
  // What the warps start with is evenly divided: 20 x 96 or 12 x 168 registers. The producers give
  // back all but 32 (24), and 16 x 112 + 4 x 32, 8 x 232 + 4 x 32 or 8 x 240 + 4 x 24 is no more
  // than that.
  static constexpr int kRegisters = kWarps == 16 ? 112 : kTileN <= 256 ? 232 : 240;
  static constexpr int kProducerRegisters = kTileN <= 256 ? 32 : 24;
  // The CTAs of a cluster share x, of which each brings a part for all of them: the GPU is at its
  // limit of power with 256 columns, and what is read from L2 takes a good part of that.
  static constexpr int kCluster = kTileN >= 256 ? 2 : 1;
  static constexpr int kStrips = kCluster * kWarps;
  static constexpr int kTileM = kStrips * kStripRows;
  // Rows that are next to each other are written together: with 256 columns that weighs more.
  static constexpr bool kWalksOn = kTileN < 256;
  // What a change of tile costs a rank (a tile is stored, another walk looked up), in quarters of a
  // group. Up to 64 columns that is too little to count; with 344 whole tiles are most of the work.
  static constexpr int kChangeQuarters = kTileN == 256 ? 8 : kTileN == 128 ? 4 : 0;
  // Fragments that are multiplied as one batch: a step. Of wide products half of one, because a
  // warp that has given the tensor cores more than they queue cannot go on decoding.
  static constexpr int kBatch = kTileN < 256 ? 4 : 2;
  // Whether a batch's values are loaded before the registers of its fragments are free. With 344
  // columns that is no faster.
  static constexpr bool kLoadsEarly = kTileN == 256;
  // A stage of x is 4 to 8 KB (16, 32 and 43 KB for 128, 256 and 344 columns), so that its barrier
  // is waited for rarely.
  static constexpr int kStageK = kTileN <= 16 ? 256 : kTileN == 32 ? 128 : 64;
  static constexpr int kStageBytes = kStageK * kColumns * 2;
  static constexpr int kBoxBytes = kStepK * kColumns * 2;
  // Columns of a box of x that a CTA brings, and of a box of y. Eight share a swizzle pattern, so
  // the two of the widest tile overlap by eight, which come, or leave, twice.
  static constexpr int kBoxN = (kColumns / kCluster + 7) / 8 * 8;
  static constexpr int kBroughtBytes = kStageK * kCluster * kBoxN * 2;  // into a stage
  static constexpr int kStages = kTileN <= 8 ? 6 : kTileN <= 256 ? 4 : 3;
  // Half as many warps have to have as many values under way; 256 columns leave no room for it. The
  // widest tiles have neighbours that read the same values: these should stay in L2.
  using Ring = std::conditional_t<kTileN == 128, BulkRing<8, 2>,
                                  BulkRing<kRingSegments, kPrefetch, (kTileN <= 256)>>;
  // Where a walk ends with its tile, its values' place is free for y.
  static constexpr bool kStoresBoxes = !kWalksOn;
  static_assert(!kStoresBoxes || BoxStore::Bytes(kColumns) <= 4 * Ring::kBytes);
  static constexpr int kBoxBarriers = kStoresBoxes ? kWarps / 4 : 0;
  static constexpr int kBarriers = kWarps * Ring::kSegments + 2 * kStages + 1 + kBoxBarriers;
  static constexpr int kSharedBytes =
      1024 + kStages * kStageBytes + kWarps * Ring::kBytes + kBarriers * 8;
};

template <int kTileN>
using WgmmaReader = StripReader<typename WgmmaConfig<kTileN>::Ring>;

// The stages of x as the consumers see them.
template <typename Config>
struct StageRing {
  uint32_t data, full;
  uint32_t empty;  // for lane i of a cluster's warp those of CTA i
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void Wait() const { BarrierWait(full + stage * 8, phase); }
  __device__ __forceinline__ void Advance() {
    if (++stage == Config::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  // To the producers, by every warp: the stage that is `back` before the current one.
  __device__ __forceinline__ void HandBack(int back, int lane) const {
    if (lane >= Config::kCluster) return;
    const int of = stage >= back ? stage - back : stage + Config::kStages - back;
    if constexpr (Config::kCluster > 1) {
      BarrierArriveInCluster(empty + of * 8);
    } else {
      BarrierArrive(empty + of * 8);
    }
  }
};

// Waits for all threads of a cluster, or of the CTA.
template <int kCluster>
__device__ __forceinline__ void SyncCluster() {
  if constexpr (kCluster > 1) {
    ClusterArrive();
    ClusterWait();
  } else {
    __syncthreads();
  }
}

// Nobody ends while others still arrive at its barriers.
template <int kCluster>
__device__ __forceinline__ void LeaveCluster() {
  if constexpr (kCluster > 1) SyncCluster<kCluster>();
}

// Brings a box of x, or a CTA's part of one to its whole cluster.
template <int kTileN>
__device__ __forceinline__ void BringX(uint32_t to, const CUtensorMap* x, int k, int column,
                                       uint32_t barrier, int cta) {
  using Config = WgmmaConfig<kTileN>;
  constexpr int kCluster = Config::kCluster;
  static_assert(kCluster <= 2);
  if constexpr (kCluster > 1) {
    const int first = cta == 0 ? 0 : Config::kColumns - Config::kBoxN;
    TensorCopy2dToCluster(to + first * kStepK * 2, x, k, column + first, barrier,
                          (1 << kCluster) - 1);
  } else {
    TensorCopy2d(to, x, k, column, barrier);
  }
}

// acc += a fragment of W x 16 k of x, whose descriptor begins with x_low.
template <typename T, int kTileN>
__device__ __forceinline__ void MultiplyFragment(float* acc, const uint32_t a[4], uint32_t x_low) {
  if constexpr (kTileN <= 256) {
    Wgmma(Tile<T, kTileN>{}, acc, a, WgmmaDescriptor(x_low));
  } else {  // an instruction takes no more than 256 columns
    constexpr int kFirst = WgmmaConfig<kTileN>::kBoxN;
    Wgmma(Tile<T, kFirst>{}, acc, a, WgmmaDescriptor(x_low));
    Wgmma(Tile<T, kTileN - kFirst>{}, acc + kFirst / 2, a,
          WgmmaDescriptor(x_low + (kFirst * kStepK * 2 >> 4)));
  }
}

// A warp's product of one piece, after which there may be `more`, by wgmma, with the other warps of
// its warpgroup. acc is in mma.m16n8k16's layout.
template <typename T, int kTileN>
__device__ __forceinline__ void MultiplyWgmma(WgmmaReader<kTileN>& reader,
                                              StageRing<WgmmaConfig<kTileN>>& x, int groups,
                                              bool more, float* acc, int lane) {
  using Config = WgmmaConfig<kTileN>;
  constexpr int kBatch = Config::kBatch;
  constexpr int kBuffers = 2;  // batches of fragments in registers: one decoded, one multiplied
  constexpr int kStageSteps = Config::kStageK / kStepK, kStepBatches = 4 / kBatch;
  // With 16 to 64 columns registers are short: the next group is asked for when half of this bitmap
  // is used up.
  constexpr int kAheadStep = kTileN <= 64 ? 2 : 0;
  uint32_t a[kBuffers][kBatch][4];
  bool holds_stage = false;  // the previous stage of x has not been handed back yet
  const uint32_t stages_low = WgmmaDescriptorLow(x.data);
  uint32_t x_low = 0;
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
#pragma unroll
    for (int step = 0; step < kGroupSteps; ++step) {
      if (step == kAheadStep) reader.LoadAhead(group + 1 < groups || more);
      const int in_stage = step % kStageSteps;
      const uint32_t word = reader.BeginStep(step);
#pragma unroll
      for (int part = 0; part < kStepBatches; ++part) {
        const int buffer = (step * kStepBatches + part) % kBuffers;
        if constexpr (Config::kLoadsEarly) {
          static_assert(kBatch == 2 && kStageSteps == 1);
          uint32_t u[2][8];
          LoadHalf(part, word, reader.p, reader.q, u);
          WgmmaWait<kBuffers - 1>();
          SelectHalf(part, word, u, a[buffer]);
        } else {
#pragma unroll
          for (int f = 0; f < kBatch; f += 2) {
            DecodeHalf(part + f / 2, word, reader.p, reader.q, a[buffer] + f);
          }
        }
        if (in_stage == 0 && part == 0) {
          x.Wait();
          x_low = stages_low + x.stage * (Config::kStageBytes >> 4);
          x.Advance();
        }
        WgmmaFence();
#pragma unroll
        for (int f = 0; f < kBatch; ++f) {
          const uint32_t offset = (in_stage * Config::kBoxBytes + (part * kBatch + f) * 32) >> 4;
          MultiplyFragment<T, kTileN>(acc, a[buffer][f], x_low + offset);
        }
        WgmmaCommit();
        if constexpr (!Config::kLoadsEarly) WgmmaWait<kBuffers - 1>();
        // The previous stage's last batch is done.
        if (in_stage == 0 && part == (Config::kLoadsEarly ? 1 : 0)) {
          if (holds_stage) x.HandBack(2, lane);
          holds_stage = true;
        }
      }
    }
    reader.NextGroup();
  }
  WgmmaWait<0>();
  x.HandBack(1, lane);
}

// The same by mma.sync: no warp waits for another one. A stage of x is a group.
template <typename T, int kTileN>
__device__ __forceinline__ void MultiplyMma(WgmmaReader<kTileN>& reader,
                                            StageRing<WgmmaConfig<kTileN>>& x, int groups,
                                            bool more, float* acc, int lane) {
  using Config = WgmmaConfig<kTileN>;
  static_assert(Config::kStageK == kGroupK);
  // ldmatrix: lane l reads row l % 8 of 8 k from l / 8; 16-byte chunks are swizzled by the row.
  const uint32_t x_lane = x.data + lane % 8 * 128 + ((lane / 8) ^ (lane % 8)) * 16;
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    reader.LoadAhead(group + 1 < groups || more);
    const uint32_t row = x_lane + x.stage * Config::kStageBytes;
#pragma unroll
    for (int step = 0; step < kGroupSteps; ++step) {
      const uint32_t word = reader.BeginStep(step);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[2][4];
        DecodeHalf(half, word, reader.p, reader.q, a);
        if (step == 0 && half == 0) x.Wait();
#pragma unroll
        for (int j = 0; j < kTileN / 8; ++j) {
          uint32_t b[4];
          LoadMatrix4(b, (row ^ (half * 64)) + step * Config::kBoxBytes + j * 1024);
          Mma(T{}, acc + 4 * j, a[0], b);
          Mma(T{}, acc + 4 * j, a[1], b + 2);
        }
      }
    }
    __syncwarp();  // every lane has read its last row of x
    x.HandBack(0, lane);
    x.Advance();
    reader.NextGroup();
  }
}

// The same for two columns. Three quarters of a fragment B of MultiplyMma would be zeros, and
// reading x is a fifth of what shared memory does there. Here the eight columns of B are the four
// fragments of a step for one column of x, and those for the other: one read serves a step. Each
// fragment A is multiplied by all of them, in sums of its own, of which one column each is used.
template <typename T>
__device__ __forceinline__ void MultiplyTwo(WgmmaReader<2>& reader, StageRing<WgmmaConfig<2>>& x,
                                            int groups, bool more, float acc[4], int lane) {
  using Config = WgmmaConfig<2>;
  static_assert(Config::kStageK == kGroupK);
  // Lane l reads 8 k of row n: the first half (l < 8) or the second one of fragment l % 4.
  const int n = lane % 8 / 4, chunk = lane % 4 * 2 + lane / 8 % 2;
  const uint32_t x_lane = x.data + n * 128 + (chunk ^ n) * 16;
  float sums[4][4] = {};
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    reader.LoadAhead(group + 1 < groups || more);
    const uint32_t row = x_lane + x.stage * Config::kStageBytes;
#pragma unroll
    for (int step = 0; step < kGroupSteps; ++step) {
      const uint32_t word = reader.BeginStep(step);
      uint32_t b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[2][4];
        DecodeHalf(half, word, reader.p, reader.q, a);
        if (step == 0 && half == 0) x.Wait();
        if (half == 0) LoadMatrix2(b, row + step * Config::kBoxBytes);
        Mma(T{}, sums[2 * half], a[0], b);
        Mma(T{}, sums[2 * half + 1], a[1], b);
      }
    }
    __syncwarp();  // every lane has read its last row of x
    x.HandBack(0, lane);
    x.Advance();
    reader.NextGroup();
  }
  // Of four neighbouring lanes, two have a column of x, each with two of the fragments. The first
  // one gets both columns, as if there were eight.
  const bool has_first = lane % 2 == 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    float sum = has_first ? sums[0][i] + sums[1][i + 1] : sums[2][i] + sums[3][i + 1];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    const float other = __shfl_xor_sync(0xffffffffu, sum, 2);
    acc[i] = lane % 4 == 0 ? sum : 0.0f;
    acc[i + 1] = lane % 4 == 0 ? other : 0.0f;
  }
}

struct WgmmaMaps {
  CUtensorMap x, y;  // y: if it is stored in boxes
};

// Weight is PackedWeight or PackedStack.
template <typename T, int kTileN, typename Weight>
__global__ void __launch_bounds__(WgmmaConfig<kTileN>::kThreads, 1)
    LscdWgmmaKernel(const __grid_constant__ WgmmaMaps maps, const Weight weight,
                    const StreamKPlan plan, const Output out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const PackedWeight& w = Select(weight);
  using Config = WgmmaConfig<kTileN>;
  constexpr int kWarps = Config::kWarps, kStages = Config::kStages, kStageK = Config::kStageK;
  constexpr int kSegments = Config::Ring::kSegments;

  const int lane = LaneId();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const uint32_t stages = (SharedAddress(DynamicShared()) + 1023) & ~1023u;
  const uint32_t rings = stages + kStages * Config::kStageBytes;
  const uint32_t ring_barriers = rings + kWarps * Config::Ring::kBytes;
  const uint32_t full = ring_barriers + kWarps * kSegments * 8, empty = full + kStages * 8;
  const uint32_t left = empty + kStages * 8, box_barriers = left + 8;

  constexpr int kCluster = Config::kCluster, kStrips = Config::kStrips;
  const int cta = kCluster > 1 ? RankInCluster() : 0;
  const Share<kStrips, Config::kWalksOn, kCluster, (Config::kChangeQuarters > 0)> share(plan);
  Piece piece = share.First();

  if (warp < kWarps) {
    if (lane < kSegments) BarrierInit(ring_barriers + (warp * kSegments + lane) * 8, 1);
  } else if (warp == kWarps && lane < kStages) {
    BarrierInit(full + lane * 8, 1);
    BarrierInit(empty + lane * 8, kStrips);
    if (lane == 0) BarrierInit(left, kWarps);
    static_assert(Config::kBoxBarriers <= kStages);
    if (lane < Config::kBoxBarriers) BarrierInit(box_barriers + lane * 8, 4);
  }
  BarrierInitFence();
  SyncCluster<kCluster>();

  if (warp >= kWarps) {
    ReleaseRegisters<Config::kProducerRegisters>();
    // The flags of the part that a share may begin with are raised here: a release waits for the
    // stores before it, which the consumers need not.
    if (warp == kWarps + 1 && piece.group0 > 0) {
      BarrierWait(left, 0);
      if (lane < kWarps) RaiseFlag<kStrips>(out, share.rank, cta * kWarps + lane);
    }
    if (warp == kWarps && lane == 0) {
      int stage = 0;
      uint32_t phase = 1;  // stages begin as if they had been handed back
      for (; share.Has(piece); piece = share.Next(piece)) {
        const int column = share.ColumnTile(piece.tile) * kTileN;
        for (int k = piece.group0 * kGroupK; k < piece.group1 * kGroupK; k += kStageK) {
          BarrierWait(empty + stage * 8, phase);
          BarrierExpect(full + stage * 8, Config::kBroughtBytes);
#pragma unroll
          for (int box = 0; box < kStageK / kStepK; ++box) {
            const uint32_t to = stages + stage * Config::kStageBytes + box * Config::kBoxBytes;
            BringX<kTileN>(to, &maps.x, k + box * kStepK, column, full + stage * 8, cta);
          }
          if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
    __syncwarp();
    LeaveCluster<kCluster>();
    return;
  }

  WgmmaReader<kTileN> reader(w, lane);
  reader.ring.data = rings + warp * Config::Ring::kBytes;
  reader.ring.barriers = ring_barriers + warp * kSegments * 8;
  const int strip = cta * kWarps + warp;  // of a tile
  if (Config::kWalksOn) {
    share.BeginWalk(reader, strip, piece);
    reader.CopyFirst();
  }
  __syncwarp();  // lane 0 may still be asking for copies
  ClaimRegisters<Config::kRegisters>();
  if (Config::kWalksOn) reader.WaitForFirstStep();

  StageRing<Config> x_stages{stages, full,
                             kCluster > 1 ? InCluster(empty, lane % kCluster) : empty};
  BoxStore boxes{&maps.y, rings + warp / 4 * 4 * Config::Ring::kBytes, box_barriers + warp / 4 * 8,
                 warp % 4, lane};
  while (share.Has(piece)) {
    if constexpr (!Config::kWalksOn) {
      share.BeginWalk(reader, strip, piece);
      boxes.WaitUntilRead();
      reader.CopyFirst();
      reader.WaitForFirstStep();
    }
    float acc[Config::kColumns / 2];
#pragma unroll
    for (int i = 0; i < Config::kColumns / 2; ++i) acc[i] = 0.0f;
    const bool goes_on = Config::kWalksOn && share.Has(share.Next(piece));
    if constexpr (kTileN == 2) {
      MultiplyTwo<T>(reader, x_stages, piece.size(), goes_on, acc, lane);
    } else if constexpr (Config::kUsesMma) {
      MultiplyMma<T, kTileN>(reader, x_stages, piece.size(), goes_on, acc, lane);
    } else {
      MultiplyWgmma<T, kTileN>(reader, x_stages, piece.size(), goes_on, acc, lane);
    }
    FinishPiece<T, kStrips, Config::kColumns>(
        acc, out, w, share, piece, strip, lane, [&] { BarrierArrive(left); },
        [&](const float* sums, const float* bias, int y_strip, int column) {
          if constexpr (Config::kStoresBoxes) {
            if (out.in_boxes) {
              const int row = (y_strip - warp % 4) * kStripRows;
              boxes.Store<T, kTileN, Config::kBoxN>(sums, bias, row, column);
              return;
            }
          }
          StoreStrip<T, Config::kColumns>(sums, bias, out, w, y_strip, column, lane);
        });
    piece = share.Next(piece);
  }
  boxes.WaitUntilRead();
  LeaveCluster<kCluster>();
#else
  __trap();
#endif
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_WGMMA_CUH_
