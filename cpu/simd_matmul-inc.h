// The product; part of simd_kernels-inc.h.
//
// A stream's step has 16 positions. They are expanded into a vector with zeros where nothing is
// stored and multiplied by the same positions of x, so that an infinity or a NaN of x meets every
// zero of W as it does in a dense product. The 16 sums of a row are added at the end.
#ifndef FLASHJAX_CPU_SIMD_MATMUL_INC_H_
#define FLASHJAX_CPU_SIMD_MATMUL_INC_H_

#include "cpu/simd_convert-inc.h"
#include "cpu/simd_stream-inc.h"

namespace flashjax {
namespace {

// Vec: 16 floats. Sum: a register of partial sums, kSumSize of them.
#if FLASHJAX_SIMD >= 2
struct Vec {
  __m512 v;
};
using Sum = Vec;
constexpr int kSumSize = 16, kSums = 24;
FLASHJAX_INLINE Vec Load(const float* in) { return {_mm512_load_ps(in)}; }
FLASHJAX_INLINE void Store(float* out, Vec a) { _mm512_store_ps(out, a.v); }
FLASHJAX_INLINE Sum LoadSum(const float* in) { return {_mm512_load_ps(in)}; }
FLASHJAX_INLINE void StoreSum(float* out, Sum a) { _mm512_store_ps(out, a.v); }
FLASHJAX_INLINE Sum MultiplyAdd(Vec a, Vec b, Sum c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
template <HalfType kType>
FLASHJAX_INLINE Vec Expand(const uint16_t* in, uint32_t mask) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  const __m512i words = kType == HalfType::kFloat16
                            ? _mm512_castps_si512(_mm512_cvtph_ps(half))
                            : _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  return {_mm512_castsi512_ps(ExpandWords(mask, words))};
}
// Tells the compiler to keep it in a register rather than to load it for each use.
FLASHJAX_INLINE void Keep(Vec* a) { asm("" : "+v"(a->v)); }
#elif FLASHJAX_SIMD >= 1
struct Vec {
  __m256 low, high;
};
struct Sum {
  __m256 v;
};
constexpr int kSumSize = 8, kSums = 8;
FLASHJAX_INLINE Vec Load(const float* in) { return {_mm256_load_ps(in), _mm256_load_ps(in + 8)}; }
FLASHJAX_INLINE void Store(float* out, Vec a) {
  _mm256_store_ps(out, a.low);
  _mm256_store_ps(out + 8, a.high);
}
FLASHJAX_INLINE Sum LoadSum(const float* in) { return {_mm256_load_ps(in)}; }
FLASHJAX_INLINE void StoreSum(float* out, Sum a) { _mm256_store_ps(out, a.v); }
FLASHJAX_INLINE Sum MultiplyAdd(Vec a, Vec b, Sum c) {
  return {_mm256_fmadd_ps(a.high, b.high, _mm256_fmadd_ps(a.low, b.low, c.v))};
}
template <HalfType kType>
FLASHJAX_INLINE __m256 ExpandHalf(const uint16_t* in, uint32_t mask) {
  const __m256i ranks =
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kRanks.ranks[mask])));
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  const __m256 words =
      kType == HalfType::kFloat16
          ? _mm256_cvtph_ps(half)
          : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(words, ranks), _mm256_setzero_ps(),
                          _mm256_castsi256_ps(ranks));
}
template <HalfType kType>
FLASHJAX_INLINE Vec Expand(const uint16_t* in, uint32_t mask) {
  return {ExpandHalf<kType>(in, mask & 0xFF),
          ExpandHalf<kType>(in + _mm_popcnt_u32(mask & 0xFF), mask >> 8)};
}
FLASHJAX_INLINE void Keep(Vec*) {}
#else
struct Vec {
  float v[16];
};
constexpr int kSumSize = 4, kSums = 8;
struct Sum {
  float v[kSumSize];
};
FLASHJAX_INLINE Vec Load(const float* in) {
  Vec a;
  std::memcpy(a.v, in, sizeof(a.v));
  return a;
}
FLASHJAX_INLINE void Store(float* out, const Vec& a) { std::memcpy(out, a.v, sizeof(a.v)); }
FLASHJAX_INLINE Sum LoadSum(const float* in) {
  Sum a;
  std::memcpy(a.v, in, sizeof(a.v));
  return a;
}
FLASHJAX_INLINE void StoreSum(float* out, const Sum& a) { std::memcpy(out, a.v, sizeof(a.v)); }
FLASHJAX_INLINE Sum MultiplyAdd(const Vec& a, const Vec& b, Sum c) {
  for (int i = 0; i < 16; i += kSumSize) {
    for (int j = 0; j < kSumSize; ++j) c.v[j] += a.v[i + j] * b.v[i + j];
  }
  return c;
}
template <HalfType kType>
FLASHJAX_INLINE Vec Expand(const uint16_t* in, uint32_t mask) {
  Vec a = {};
  for (; mask != 0; mask &= mask - 1) {
    const uint16_t half = *in++;
    a.v[__builtin_ctz(mask)] =
        kType == HalfType::kFloat16 ? HalfToFloat(half) : Bfloat16ToFloat(half);
  }
  return a;
}
FLASHJAX_INLINE void Keep(Vec*) {}
#endif

// Rows of the strip whose sums stay in registers together: 8, 4, 2 or 1.
constexpr int BlockRows(int n) {
  int rows = 8;
  while (rows > 1 && rows * n > kSums) rows /= 2;
  return rows;
}

// The weights of a group, expanded: [16 rows][4 steps][4 t][16 positions].
constexpr int kExpandedRow = kGroupSteps * 4 * kStreamPositions;

// Where MultiplyGroup gets the weights of row g + 8 s from: the ring, or expanded ones.
template <HalfType kType>
struct FromRing {
  const Ring* ring;
  FLASHJAX_INLINE Vec Get(int g, int s, int j, int t) const {
    const int i = Ring::Index(g, t, j) + s;
    return Expand<kType>(ring->streams + ring->starts[i], ring->masks[i]);
  }
};
struct FromExpanded {
  const float* weights;
  FLASHJAX_INLINE Vec Get(int g, int s, int j, int t) const {
    return Load(weights + (g + 8 * s) * kExpandedRow + (4 * j + t) * kStreamPositions);
  }
};

template <HalfType kType>
FLASHJAX_TARGET void ExpandGroup(const Ring* ring, float* weights) {
  const FromRing<kType> from{ring};
  for (int s = 0; s < 2; ++s) {
    for (int g = 0; g < 8; ++g) {
      for (int j = 0; j < kGroupSteps; ++j) {
        for (int t = 0; t < 4; ++t, weights += kStreamPositions) {
          Store(weights, from.Get(g, s, j, t));
        }
      }
    }
  }
}

// Adds a group's products to sums [16 rows][kN][kSumSize]. x is the group's part of a tile of the
// permuted x. With more than one row at a time these are rows g and, for the lanes' other stream,
// g + 8.
template <int kN, typename From>
FLASHJAX_INLINE void MultiplyGroup(From from, const float* x, float* sums) {
  constexpr int kRows = BlockRows(kN), kRowsG = kRows > 1 ? kRows / 2 : 1;
  constexpr int kRowsS = kRows > 1 ? 2 : 1;
  for (int block = 0; block < kStripRows; block += kRows) {
    const int g0 = kRows > 1 ? block / 2 : block % 8, s0 = kRows > 1 ? 0 : block / 8;
    Sum sum[kRowsG][kRowsS][kN];
#pragma GCC unroll 4
    for (int g = 0; g < kRowsG; ++g) {
#pragma GCC unroll 2
      for (int s = 0; s < kRowsS; ++s) {
        const float* in = sums + (g0 + g + 8 * (s0 + s)) * kN * kSumSize;
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) sum[g][s][n] = LoadSum(in + n * kSumSize);
      }
    }
    const float* next_x = x;
    for (int j = 0; j < kGroupSteps; ++j) {
      for (int t = 0; t < 4; ++t, next_x += kN * kStreamPositions) {
        Vec xs[kN];
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) {
          xs[n] = Load(next_x + n * kStreamPositions);
          if (kRows > 1) Keep(&xs[n]);
        }
#pragma GCC unroll 4
        for (int g = 0; g < kRowsG; ++g) {
#pragma GCC unroll 2
          for (int s = 0; s < kRowsS; ++s) {
            const Vec w = from.Get(g0 + g, s0 + s, j, t);
#pragma GCC unroll 8
            for (int n = 0; n < kN; ++n) sum[g][s][n] = MultiplyAdd(w, xs[n], sum[g][s][n]);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < kRowsG; ++g) {
#pragma GCC unroll 2
      for (int s = 0; s < kRowsS; ++s) {
        float* out = sums + (g0 + g + 8 * (s0 + s)) * kN * kSumSize;
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) StoreSum(out + n * kSumSize, sum[g][s][n]);
      }
    }
  }
}

template <HalfType kType, int kN>
FLASHJAX_TARGET void MultiplyRing(const Ring* ring, const float* x, float* sums) {
  MultiplyGroup<kN>(FromRing<kType>{ring}, x, sums);
}

template <int kN>
FLASHJAX_TARGET void MultiplyExpanded(const float* weights, const float* x, float* sums) {
  MultiplyGroup<kN>(FromExpanded{weights}, x, sums);
}

// Adds up the kSumSize partial sums of each of the 16 rows, which are `stride` apart, always in the
// same order.
FLASHJAX_INLINE void AddUp(const float* sums, int64_t stride, float* out) {
#if FLASHJAX_SIMD >= 2
  __m512i a[kStripRows];
#pragma GCC unroll 16
  for (int row = 0; row < kStripRows; ++row) a[row] = _mm512_load_si512(sums + row * stride);
  Transpose16x16Word(a);
#pragma GCC unroll 4
  for (int width = kSumSize / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
      a[i] = _mm512_castps_si512(
          _mm512_add_ps(_mm512_castsi512_ps(a[i]), _mm512_castsi512_ps(a[i + width])));
    }
  }
  _mm512_storeu_si512(out, a[0]);
#else
  for (int row = 0; row < kStripRows; ++row) {
    float a[kSumSize];
    std::memcpy(a, sums + row * stride, sizeof(a));
    for (int width = kSumSize / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) a[i] += a[i + width];
    }
    out[row] = a[0];
  }
#endif
}

// Sums of up to this many tiles are kept while a strip is walked through; its weights are decoded
// again for those that follow.
constexpr int64_t kMaxTiles = 32;

template <HalfType kType>
FLASHJAX_TARGET void MatmulStripsAs(const MatmulJob& job, int64_t first, int64_t strips) {
  using FromRingFunction = void (*)(const Ring*, const float*, float*);
  using FromExpandedFunction = void (*)(const float*, const float*, float*);
  constexpr FromRingFunction kFromRing[kTileN] = {MultiplyRing<kType, 1>, MultiplyRing<kType, 2>,
                                                  MultiplyRing<kType, 3>, MultiplyRing<kType, 4>,
                                                  MultiplyRing<kType, 5>, MultiplyRing<kType, 6>,
                                                  MultiplyRing<kType, 7>, MultiplyRing<kType, 8>};
  constexpr FromExpandedFunction kFromExpanded[kTileN] = {
      MultiplyExpanded<1>, MultiplyExpanded<2>, MultiplyExpanded<3>, MultiplyExpanded<4>,
      MultiplyExpanded<5>, MultiplyExpanded<6>, MultiplyExpanded<7>, MultiplyExpanded<8>};
  constexpr int kTileSums = kStripRows * kTileN * kSumSize;
  struct alignas(64) Scratch {
    Ring ring;
    alignas(64) float weights[kStripRows * kExpandedRow];
  };
  struct alignas(64) TileSums {
    float values[kTileSums];
  };
  const LscdShape& shape = job.w.shape;
  const int64_t tiles = std::min(kMaxTiles, CeilDiv(job.n, kTileN));
  const std::unique_ptr<Scratch> scratch(new Scratch);
  const std::unique_ptr<TileSums[]> sums(new TileSums[tiles]);
  for (int64_t strip = first; strip < first + strips; ++strip) {
    const uint32_t* bitmap = job.w.bitmap + strip * shape.groups() * kLanes * kGroupSteps;
    const uint32_t* entries = job.w.entries + strip * shape.entries() * kEntryWords;
    for (int64_t begin = 0; begin < job.n; begin += tiles * kTileN) {
      const int64_t end = std::min(job.n, begin + tiles * kTileN);
      std::memset(sums.get(), 0, CeilDiv(end - begin, kTileN) * sizeof(TileSums));
      if (shape.groups() > 0) StartStrip(&scratch->ring, entries);
      for (int64_t group = 0; group < shape.groups(); ++group) {
        NextGroup(&scratch->ring, bitmap, entries, job.w.values, job.w.segments, group);
        const bool expanded = end - begin > kTileN;
        if (expanded) ExpandGroup<kType>(&scratch->ring, scratch->weights);
        for (int64_t n0 = begin; n0 < end; n0 += kTileN) {
          const int64_t n = std::min<int64_t>(kTileN, end - n0);
          const float* x = job.permuted + job.TileOffset(n0) + group * n * kGroupK;
          float* tile = sums[(n0 - begin) / kTileN].values;
          if (expanded) {
            kFromExpanded[n - 1](scratch->weights, x, tile);
          } else {
            kFromRing[n - 1](&scratch->ring, x, tile);
          }
        }
      }
      const int64_t row = strip * kStripRows;
      const int64_t rows = std::min<int64_t>(kStripRows, shape.m - row);
      float bias[kStripRows] = {};
      if (job.bias != nullptr) std::memcpy(bias, job.bias + row, rows * sizeof(float));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n0 = i - i % kTileN, n = std::min<int64_t>(kTileN, end - n0);
        float out[kStripRows];
        AddUp(sums[(n0 - begin) / kTileN].values + (i - n0) * kSumSize, n * kSumSize, out);
        for (int r = 0; r < kStripRows; ++r) out[r] += bias[r];
        StoreRow(out, job.y_type, rows, job.y, i * shape.m + row);
      }
    }
  }
}

FLASHJAX_TARGET void MatmulStrips(const MatmulJob& job, int64_t first, int64_t strips) {
  if (job.w.type == HalfType::kFloat16) {
    MatmulStripsAs<HalfType::kFloat16>(job, first, strips);
  } else {
    MatmulStripsAs<HalfType::kBfloat16>(job, first, strips);
  }
}

FLASHJAX_TARGET void PermuteX(const MatmulJob& job, int64_t first, int64_t steps) {
  const int64_t k = job.w.shape.k;
  for (int64_t n = 0; n < job.n; ++n) {
    const int64_t n0 = n / kTileN * kTileN;
    const int64_t width = std::min<int64_t>(kTileN, job.n - n0);
    float* out =
        job.permuted + job.TileOffset(n0) + (n - n0) * kStreamPositions + first * width * kStepK;
    for (int64_t step = first; step < first + steps; ++step, out += width * kStepK) {
      const int64_t begin = n * k + step * kStepK;
      const int64_t size = std::clamp<int64_t>(k - step * kStepK, 0, kStepK);
      float row[kStepK];
      if (size < kStepK) std::fill(row, row + kStepK, 0.0f);
      if (job.x_type == FloatType::kFloat32) {
        std::memcpy(row, static_cast<const float*>(job.x) + begin, size * sizeof(float));
      } else {
        ToFloat(static_cast<const uint16_t*>(job.x) + begin,
                job.x_type == FloatType::kFloat16 ? HalfType::kFloat16 : HalfType::kBfloat16, size,
                row);
      }
      for (int t = 0; t < 4; ++t) {
        for (int i = 0; i < kStreamPositions; i += 2) {
          std::memcpy(out + t * width * kStreamPositions + i, row + PositionColumn(t, i),
                      2 * sizeof(float));
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_MATMUL_INC_H_
