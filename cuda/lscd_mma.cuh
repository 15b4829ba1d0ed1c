// y = x W^T from Ampere on (sm_80): packed weights are expanded into mma.sync's A registers.
//
// A CTA is four warps, each with a strip of 16 rows; two CTAs fit a multiprocessor. Values come by
// cp.async into a ring a warp. x is staged a group (256 k) at a time: through registers into one of
// two shared buffers [kTileN][256], 16-byte chunks permuted by the row so that ldmatrix does not
// conflict. Any alignment of x is taken. Balance and reduction: lscd_stream_k.cuh.
#ifndef FLASHJAX_CUDA_LSCD_MMA_CUH_
#define FLASHJAX_CUDA_LSCD_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common/mma.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/lscd_async_ring.cuh"
#include "cuda/lscd_stream_k.cuh"
#include "cuda/lscd_strip_reader.cuh"

namespace flashjax {

template <int kTileN>
struct MmaConfig {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kColumns = kTileN, kCluster = 1, kStrips = kWarps;
  static constexpr int kTileM = kStrips * kStripRows;
  static constexpr bool kWalksOn = true;
  static constexpr int kChangeQuarters = 0;
  static constexpr int kRowBytes = kGroupK * 2;
  static constexpr int kStageBytes = kTileN * kRowBytes;
  static constexpr int kSharedBytes = 2 * kStageBytes + kWarps * AsyncRing::kBytes;
};

// x (n, k), row-major, as 16-bit patterns.
struct DenseInput {
  const uint16_t* x;
  int n, k;
  bool aligned;  // rows can be read 16 bytes at a time
};

// A thread's share of one group of x.
template <int kTileN>
struct StageLoader {
  static constexpr int kChunks = kTileN * (kGroupK / 8) / MmaConfig<kTileN>::kThreads;
  uint4 chunk[kChunks];

  __device__ __forceinline__ void Load(const DenseInput& in, int group) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * MmaConfig<kTileN>::kThreads + threadIdx.x;
      const int n = index / (kGroupK / 8), k = group * kGroupK + index % (kGroupK / 8) * 8;
      const uint16_t* source = in.x + int64_t{n} * in.k + k;
      chunk[i] = make_uint4(0, 0, 0, 0);
      if (n >= in.n || k >= in.k) continue;
      if (in.aligned) {
        chunk[i] = __ldg(reinterpret_cast<const uint4*>(source));
      } else {
        uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (k + j < in.k) words[j / 2] |= uint32_t{source[j]} << (16 * (j % 2));
        }
        chunk[i] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
  __device__ __forceinline__ void Store(uint8_t* stage) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * MmaConfig<kTileN>::kThreads + threadIdx.x;
      const int n = index / (kGroupK / 8), c = index % (kGroupK / 8);
      *reinterpret_cast<uint4*>(stage + n * MmaConfig<kTileN>::kRowBytes + (c ^ (n % 8)) * 16) =
          chunk[i];
    }
  }
};

// Weight is PackedWeight or PackedStack.
template <typename T, int kTileN, typename Weight>
__global__ void __launch_bounds__(MmaConfig<kTileN>::kThreads, 2)
    LscdMmaKernel(const DenseInput x, const Weight weight, const StreamKPlan plan,
                  const Output out) {
  const PackedWeight& w = Select(weight);
  using Config = MmaConfig<kTileN>;
  constexpr int kWarps = Config::kWarps;
  uint8_t* const shared = DynamicShared();
  const int lane = LaneId(), warp = threadIdx.x / 32;
  const uint32_t stages = SharedAddress(shared);

  const Share<kWarps, true> share(plan);
  Piece piece = share.First();

  StripReader<AsyncRing> reader(w, lane);
  reader.ring.data = stages + 2 * Config::kStageBytes + warp * AsyncRing::kBytes;
  share.BeginWalk(reader, warp, piece);
  reader.CopyFirst();
  reader.WaitForFirstStep();
  StageLoader<kTileN> loader;
  int buffer = 0;

  while (share.Has(piece)) {
    loader.Load(x, piece.group0);
    float acc[kTileN / 2];
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i) acc[i] = 0.0f;
#pragma unroll 1
    for (int group = piece.group0; group < piece.group1; ++group) {
      // One barrier a group is enough: the buffer written here was read two groups ago.
      loader.Store(shared + buffer * Config::kStageBytes);
      __syncthreads();
      if (group + 1 < piece.group1) loader.Load(x, group + 1);
      reader.LoadAhead(group + 1 < piece.group1 || share.Has(share.Next(piece)));
      const uint32_t stage = stages + buffer * Config::kStageBytes + lane % 8 * Config::kRowBytes;
#pragma unroll
      for (int step = 0; step < kGroupSteps; ++step) {
        const uint32_t word = reader.BeginStep(step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t a[2][4];
          DecodeHalf(half, word, reader.p, reader.q, a);
          const int chunk = 8 * step + 4 * half + lane / 8;
#pragma unroll
          for (int j = 0; j < kTileN / 8; ++j) {
            uint32_t b[4];
            LoadMatrix4(b, stage + 8 * j * Config::kRowBytes + (chunk ^ (lane % 8)) * 16);
            Mma(T{}, acc + 4 * j, a[0], b);
            Mma(T{}, acc + 4 * j, a[1], b + 2);
          }
        }
      }
      reader.NextGroup();
      buffer ^= 1;
    }
    FinishPiece<T, kWarps, kTileN>(
        acc, out, w, share, piece, warp, lane, [&] { RaiseFlag<kWarps>(out, share.rank, warp); },
        [&](const float* sums, const float* bias, int strip, int column) {
          StoreStrip<T, kTileN>(sums, bias, out, w, strip, column, lane);
        });
    piece = share.Next(piece);
  }
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_MMA_CUH_
