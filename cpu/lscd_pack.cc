#include "cpu/lscd_pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/simd.h"

namespace flashjax {
namespace {

constexpr int64_t kTileSize = kStreams * kStreamPositions;
constexpr int64_t kSegmentSize = kSegmentWords * kLanes;

// One step of a strip, as (64 columns, 16 rows), goes to the outputs that there are.
class TileWriter {
 public:
  TileWriter(uint16_t* tiles, uint16_t* masks) : tiles_(tiles), masks_(masks) {}

  void Write(int64_t step, const uint16_t* block, int64_t stride) {
    kernels_.load_tile(block, stride, tiles_ != nullptr ? tiles_ + step * kTileSize : tile_,
                       masks_ != nullptr ? masks_ + step * kStreams : mask_);
  }

 private:
  const LscdKernels& kernels_ = Kernels();
  uint16_t *tiles_, *masks_;
  uint16_t tile_[kTileSize], mask_[kStreams];
};

struct Chain {
  int64_t first, strips;
};

Chain ChainStrips(const LscdShape& shape, int64_t chain) {
  const int64_t first = chain * shape.chain_strips();
  return {first, std::min(shape.chain_strips(), shape.strips() - first)};
}

}  // namespace

// Row by row of the dense matrix, so that a page is visited once for all strips.
StripLoader DenseStrips(const uint16_t* dense, const LscdShape& shape) {
  return [dense, shape](int64_t first, int64_t strips, uint16_t* tiles, uint16_t* masks) {
    TileWriter writer(tiles, masks);
    uint16_t padded[kStepK * kStripRows];
    for (int64_t step = 0; step < shape.steps(); ++step) {
      const int64_t rows = std::clamp<int64_t>(shape.k - step * kStepK, 0, kStepK);
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t column = (first + strip) * kStripRows;
        const int64_t columns = std::min<int64_t>(kStripRows, shape.m - column);
        const uint16_t* block = dense + step * kStepK * shape.m + column;
        if (rows == kStepK && columns == kStripRows) {
          writer.Write(strip * shape.steps() + step, block, shape.m);
          continue;
        }
        std::memset(padded, 0, sizeof(padded));
        for (int64_t row = 0; row < rows; ++row) {
          std::memcpy(padded + row * kStripRows, block + row * shape.m, columns * sizeof(uint16_t));
        }
        writer.Write(strip * shape.steps() + step, padded, kStripRows);
      }
    }
  };
}

StripLoader RowStrips(const SparseRows& rows) {
  return [&rows](int64_t first, int64_t strips, uint16_t* tiles, uint16_t* masks) {
    const LscdShape shape{rows.rows(), rows.k()};
    TileWriter writer(tiles, masks);
    uint16_t block[kStepK * kStripRows];
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t row = (first + strip) * kStripRows;
      std::vector<SparseRows::Cursor> cursors;
      for (int64_t r = row; r < std::min(row + kStripRows, shape.m); ++r) {
        cursors.push_back(rows.Row(r));
      }
      for (int64_t step = 0; step < shape.steps(); ++step) {
        const int64_t columns = std::clamp<int64_t>(shape.k - step * kStepK, 0, kStepK);
        std::memset(block, 0, sizeof(block));
        for (size_t r = 0; columns > 0 && r < cursors.size(); ++r) {
          uint16_t* out = block + r;
          cursors[r].Read(static_cast<int>(columns),
                          [out](int place, uint16_t value) { out[place * kStripRows] = value; });
        }
        writer.Write(strip * shape.steps() + step, block, kStripRows);
      }
    }
  };
}

int64_t LscdPlan(const StripLoader& load, const LscdShape& shape, const ParallelFor& parallel_for,
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
    load(chain.first, chain.strips, nullptr, masks.data());
    segments[i] = kernels.plan_chain(masks.data(), chain.strips * steps, steps, shape.spread(),
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

void LscdFill(const StripLoader& load, const LscdShape& shape, const ParallelFor& parallel_for,
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
    load(chain.first, chain.strips, tiles.data(), nullptr);
    kernels.fill_chain(tiles.data(), chain.strips * steps, bitmap + chain.first * bitmap_words,
                       end - begin, values + begin * kSegmentSize);
  });
}

}  // namespace flashjax
