#include "cpu/lscd_pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/simd.h"

namespace flashjax {
namespace {

constexpr int64_t kTileSize = kStreams * kStreamPositions;
constexpr int64_t kSegmentSize = kSegmentWords * kLanes;

// Cuts the strips of a chain into tiles. Row by row of the dense matrix, so that a page is visited
// once for all strips of the chain. Without `tiles` only the masks are kept.
void LoadChain(const LscdKernels& kernels, const uint16_t* dense, const LscdShape& shape,
               int64_t first, int64_t strips, uint16_t* tiles, uint16_t* masks) {
  const int64_t steps = shape.steps();
  uint16_t padded[kStepK * kStripRows], tile[kTileSize], mask[kStreams];
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t rows = std::clamp<int64_t>(shape.k - step * kStepK, 0, kStepK);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t column = (first + strip) * kStripRows;
      const int64_t columns = std::min<int64_t>(kStripRows, shape.m - column);
      const int64_t u = strip * steps + step;
      uint16_t* out = tiles != nullptr ? tiles + u * kTileSize : tile;
      uint16_t* out_masks = masks != nullptr ? masks + u * kStreams : mask;
      const uint16_t* block = dense + step * kStepK * shape.m + column;
      if (rows == kStepK && columns == kStripRows) {
        kernels.load_tile(block, shape.m, out, out_masks);
        continue;
      }
      std::memset(padded, 0, sizeof(padded));
      for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(padded + row * kStripRows, block + row * shape.m, columns * sizeof(uint16_t));
      }
      kernels.load_tile(padded, kStripRows, out, out_masks);
    }
  }
}

struct Chain {
  int64_t first, strips;
};

Chain ChainStrips(const LscdShape& shape, int64_t chain) {
  const int64_t first = chain * shape.chain_strips();
  return {first, std::min(shape.chain_strips(), shape.strips() - first)};
}

}  // namespace

int64_t LscdPlan(const uint16_t* dense, const LscdShape& shape, const ParallelFor& parallel_for,
                 uint32_t* bitmap, uint32_t* entries, uint32_t* counts) {
  const LscdKernels& kernels = Kernels();
  const int64_t steps = shape.steps(), chains = shape.chains();
  if (steps == 0) {
    std::fill(counts, counts + shape.strips(), 0);
    return 0;
  }
  const int64_t bitmap_words = shape.groups() * kLanes * kGroupSteps;
  const int64_t entries_words = shape.entries() * kEntryWords;
  std::vector<int64_t> segments(chains);
  parallel_for.run(chains, [&](int64_t i) {
    const Chain chain = ChainStrips(shape, i);
    std::vector<uint16_t> masks(chain.strips * steps * kStreams);
    LoadChain(kernels, dense, shape, chain.first, chain.strips, nullptr, masks.data());
    segments[i] = kernels.plan_chain(masks.data(), chain.strips * steps, steps,
                                     bitmap + chain.first * bitmap_words,
                                     entries + chain.first * entries_words, counts + chain.first);
  });
  int64_t base = 0;
  for (int64_t i = 0; i < chains; ++i) {
    const Chain chain = ChainStrips(shape, i);
    uint32_t* entry = entries + chain.first * entries_words;
    for (int64_t e = 0; e < chain.strips * shape.entries(); ++e, entry += kEntryWords) {
      entry[0] += static_cast<uint32_t>(base);
    }
    base += segments[i];
  }
  return base;
}

void LscdFill(const uint16_t* dense, const LscdShape& shape, const ParallelFor& parallel_for,
              const uint32_t* bitmap, const uint32_t* entries, int64_t segments, uint32_t* values) {
  if (segments == 0) return;
  const LscdKernels& kernels = Kernels();
  const int64_t steps = shape.steps(), chains = shape.chains();
  const int64_t bitmap_words = shape.groups() * kLanes * kGroupSteps;
  const int64_t entries_words = shape.entries() * kEntryWords;
  parallel_for.run(chains, [&](int64_t i) {
    const Chain chain = ChainStrips(shape, i);
    const int64_t begin = entries[chain.first * entries_words];
    const int64_t end =
        i + 1 < chains ? entries[(chain.first + chain.strips) * entries_words] : segments;
    if (begin == end) return;
    std::vector<uint16_t> tiles(chain.strips * steps * kTileSize);
    LoadChain(kernels, dense, shape, chain.first, chain.strips, tiles.data(), nullptr);
    kernels.fill_chain(tiles.data(), chain.strips * steps, bitmap + chain.first * bitmap_words,
                       end - begin, values + begin * kSegmentSize);
  });
}

}  // namespace flashjax
