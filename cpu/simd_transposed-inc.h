// The product with the transposed weights; part of simd_kernels-inc.h.
//
// dx (n, K) = dy (n, M) W. The 16 positions of a stream's step are a vector along k; it is
// multiplied by one number of dy and added to the vector of dx that has the same k. What a strip
// adds to 64 k of some rows of dx stays in registers.
#ifndef FLASHJAX_CPU_SIMD_TRANSPOSED_INC_H_
#define FLASHJAX_CPU_SIMD_TRANSPOSED_INC_H_

#include "cpu/simd_convert-inc.h"
#include "cpu/simd_matmul-inc.h"
#include "cpu/simd_stream-inc.h"

namespace flashjax {
namespace {

#if FLASHJAX_SIMD >= 2
FLASHJAX_INLINE Vec MultiplyAdd(Vec a, float b, Vec c) {
  return {_mm512_fmadd_ps(a.v, _mm512_set1_ps(b), c.v)};
}
#elif FLASHJAX_SIMD >= 1
FLASHJAX_INLINE Vec MultiplyAdd(Vec a, float b, Vec c) {
  const __m256 factor = _mm256_set1_ps(b);
  return {_mm256_fmadd_ps(a.low, factor, c.low), _mm256_fmadd_ps(a.high, factor, c.high)};
}
#else
FLASHJAX_INLINE Vec MultiplyAdd(const Vec& a, float b, Vec c) {
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b;
  return c;
}
#endif

// Rows of dx whose sums stay in registers together.
constexpr int kSumRows = FLASHJAX_SIMD >= 2 ? 8 : FLASHJAX_SIMD == 1 ? 4 : 1;

// Adds a group's products to its part of a tile of sums, [4 steps][4 t][kN][16 positions]. `dy` is
// the strip's: [16 rows of W][kN].
template <int kN, typename From>
FLASHJAX_INLINE void AddGroup(From from, const float* dy, float* sums) {
  constexpr int kRows = kN < kSumRows ? kN : kSumRows;
  for (int j = 0; j < kGroupSteps; ++j) {
    for (int t = 0; t < 4; ++t, sums += kN * kStreamPositions) {
#pragma GCC unroll 8
      for (int n0 = 0; n0 < kN; n0 += kRows) {
        Vec sum[kRows];
#pragma GCC unroll 8
        for (int n = 0; n < kRows; ++n) {
          if (n0 + n < kN) sum[n] = Load(sums + (n0 + n) * kStreamPositions);
        }
        for (int g = 0; g < 8; ++g) {
#pragma GCC unroll 2
          for (int s = 0; s < 2; ++s) {
            const Vec w = from.Get(g, s, j, t);
            const float* factors = dy + (g + 8 * s) * kN + n0;
#pragma GCC unroll 8
            for (int n = 0; n < kRows; ++n) {
              if (n0 + n < kN) sum[n] = MultiplyAdd(w, factors[n], sum[n]);
            }
          }
        }
#pragma GCC unroll 8
        for (int n = 0; n < kRows; ++n) {
          if (n0 + n < kN) Store(sums + (n0 + n) * kStreamPositions, sum[n]);
        }
      }
    }
  }
}

template <HalfType kType, int kN>
FLASHJAX_TARGET void AddRing(const Ring* ring, const float* dy, float* sums) {
  AddGroup<kN>(FromRing<kType>{ring}, dy, sums);
}

template <int kN>
FLASHJAX_TARGET void AddExpanded(const float* weights, const float* dy, float* sums) {
  AddGroup<kN>(FromExpanded{weights}, dy, sums);
}

// A strip's columns of some rows of dy as floats, [16][n], zeros beyond M.
FLASHJAX_TARGET void LoadFactors(const TransposedJob& job, int64_t strip, int64_t n0, int64_t n,
                                 float* out) {
  const int64_t m = job.w.shape.m, column = strip * kStripRows;
  const int64_t columns = std::min<int64_t>(kStripRows, m - column);
  for (int64_t i = 0; i < n; ++i) {
    float row[kStripRows] = {};
    const int64_t begin = (n0 + i) * m + column;
    if (job.dy_type == FloatType::kFloat32) {
      std::memcpy(row, static_cast<const float*>(job.dy) + begin, columns * sizeof(float));
    } else {
      ToFloat(static_cast<const uint16_t*>(job.dy) + begin,
              job.dy_type == FloatType::kFloat16 ? HalfType::kFloat16 : HalfType::kBfloat16,
              columns, row);
    }
    for (int r = 0; r < kStripRows; ++r) out[r * n + i] = row[r];
  }
}

template <HalfType kType>
FLASHJAX_TARGET void AddStripsAs(const TransposedJob& job, int64_t entry, int64_t first,
                                 int64_t strips, float* sums) {
  using FromRingFunction = void (*)(const Ring*, const float*, float*);
  using FromExpandedFunction = void (*)(const float*, const float*, float*);
  constexpr FromRingFunction kFromRing[kTileN] = {
      AddRing<kType, 1>, AddRing<kType, 2>, AddRing<kType, 3>, AddRing<kType, 4>,
      AddRing<kType, 5>, AddRing<kType, 6>, AddRing<kType, 7>, AddRing<kType, 8>};
  constexpr FromExpandedFunction kFromExpanded[kTileN] = {
      AddExpanded<1>, AddExpanded<2>, AddExpanded<3>, AddExpanded<4>,
      AddExpanded<5>, AddExpanded<6>, AddExpanded<7>, AddExpanded<8>};
  struct alignas(64) Scratch {
    Ring ring;
    alignas(64) float weights[kStripRows * kExpandedRow];
  };
  const LscdShape& shape = job.w.shape;
  const int64_t begin = entry * kEntrySteps / kGroupSteps;
  const int64_t end = std::min(shape.groups(), begin + kEntrySteps / kGroupSteps);
  const std::unique_ptr<Scratch> scratch(new Scratch);
  const std::unique_ptr<float[]> factors(new float[job.n * kStripRows]);
  for (int64_t n0 = 0; n0 < job.n; n0 += kTileN) {
    const int64_t n = std::min<int64_t>(kTileN, job.n - n0);
    float* tile = sums + job.TileOffset(n0);
    std::memset(tile + begin * n * kGroupK, 0, (end - begin) * n * kGroupK * sizeof(float));
  }
  const bool expanded = job.n > kSumRows;
  for (int64_t strip = first; strip < first + strips; ++strip) {
    const uint32_t* bitmap = job.w.bitmap + strip * shape.groups() * kLanes * kGroupSteps;
    const uint32_t* entries = job.w.entries + strip * shape.entries() * kEntryWords;
    for (int64_t n0 = 0; n0 < job.n; n0 += kTileN) {
      LoadFactors(job, strip, n0, std::min<int64_t>(kTileN, job.n - n0),
                  factors.get() + n0 * kStripRows);
    }
    StartStrip(&scratch->ring, entries + entry * kEntryWords);
    for (int64_t group = begin; group < end; ++group) {
      NextGroup(&scratch->ring, bitmap, entries, job.w.values, job.w.segments, group);
      if (expanded) ExpandGroup<kType>(&scratch->ring, scratch->weights);
      for (int64_t n0 = 0; n0 < job.n; n0 += kTileN) {
        const int64_t n = std::min<int64_t>(kTileN, job.n - n0);
        float* tile = sums + job.TileOffset(n0) + group * n * kGroupK;
        const float* dy = factors.get() + n0 * kStripRows;
        if (expanded) {
          kFromExpanded[n - 1](scratch->weights, dy, tile);
        } else {
          kFromRing[n - 1](&scratch->ring, dy, tile);
        }
      }
    }
  }
}

FLASHJAX_TARGET void AddStrips(const TransposedJob& job, int64_t entry, int64_t first,
                               int64_t strips, float* sums) {
  if (job.w.type == HalfType::kFloat16) {
    AddStripsAs<HalfType::kFloat16>(job, entry, first, strips, sums);
  } else {
    AddStripsAs<HalfType::kBfloat16>(job, entry, first, strips, sums);
  }
}

FLASHJAX_TARGET void StoreSums(const TransposedJob& job, int64_t first, int64_t steps) {
  const int64_t k = job.w.shape.k, size = job.n * job.w.shape.steps() * kStepK;
  for (int64_t n = 0; n < job.n; ++n) {
    const int64_t n0 = n / kTileN * kTileN;
    const int64_t width = std::min<int64_t>(kTileN, job.n - n0);
    const float* in =
        job.sums + job.TileOffset(n0) + (n - n0) * kStreamPositions + first * width * kStepK;
    for (int64_t step = first; step < first + steps; ++step, in += width * kStepK) {
      float row[kStepK];
      for (int t = 0; t < 4; ++t) {
        alignas(64) float sum[kStreamPositions];
        const float* part = in + t * width * kStreamPositions;
        std::memcpy(sum, part, sizeof(sum));
        for (int64_t block = 1; block < job.blocks; ++block) {
          for (int i = 0; i < kStreamPositions; ++i) sum[i] += part[block * size + i];
        }
        for (int i = 0; i < kStreamPositions; i += 2) {
          std::memcpy(row + PositionColumn(t, i), sum + i, 2 * sizeof(float));
        }
      }
      for (int64_t i = 0; i < kStepK; i += kStripRows) {
        const int64_t column = step * kStepK + i;
        const int64_t count = std::min<int64_t>(kStripRows, k - column);
        if (count > 0) StoreRow(row + i, job.dx_type, count, job.dx, n * k + column);
      }
    }
  }
}

}  // namespace
}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_TRANSPOSED_INC_H_
