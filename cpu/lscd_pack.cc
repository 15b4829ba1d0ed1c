#include "cpu/lscd_pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
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

// Of the 64 columns of a row in a step, where each stands in what four lanes have of them: column
// 8 p + 2 t + b is position 2 p + b of lane t.
struct Places {
  uint8_t of[kStepK];
  constexpr Places() : of() {
    for (int c = 0; c < kStepK; ++c) {
      of[c] = static_cast<uint8_t>(c % 8 / 2 * kStreamPositions + c / 8 * 2 + c % 2);
    }
  }
};
constexpr Places kPlaces;

// The same for a bit a column: those of lane t.
uint16_t LaneBits(uint64_t columns, int t) {
  uint64_t x = (columns >> (2 * t)) & 0x0303030303030303u;
  x = (x | x >> 6) & 0x000F000F000F000Fu;
  x = (x | x >> 12) & 0x000000FF000000FFu;
  return static_cast<uint16_t>(x | x >> 24);
}

// A row's share of a step, uint16 [4 lanes][16 positions], which comes as zeros.
void LoadRow(SparseRows::Cursor& cursor, int columns, uint16_t* tile) {
  cursor.Read(columns, [tile](int column, uint16_t value) {
    tile[kPlaces.of[column]] = (value & 0x7FFF) != 0 ? value : 0;
  });
}

// Which of them are not zero, uint16 [4 lanes].
void LoadRowMask(SparseRows::Cursor& cursor, int columns, bool has_zeros, uint16_t* mask) {
  uint64_t bits = 0;
  if (!has_zeros) {
    bits = cursor.ReadMask(columns);
  } else {
    cursor.Read(columns, [&bits](int column, uint16_t value) {
      if ((value & 0x7FFF) != 0) bits |= uint64_t{1} << column;
    });
  }
  for (int t = 0; t < 4; ++t) mask[t] = LaneBits(bits, t);
}

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
  const auto load = [dense, shape](int64_t first, int64_t strips, uint16_t* tiles,
                                   uint16_t* masks) {
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
  return {load, true};
}

StripLoader RowStrips(const SparseRows& rows) {
  const auto load = [&rows](int64_t first, int64_t strips, uint16_t* tiles, uint16_t* masks) {
    const LscdShape shape{rows.rows(), rows.k()};
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t row = (first + strip) * kStripRows;
      std::vector<SparseRows::Cursor> cursors;
      for (int64_t r = row; r < std::min(row + kStripRows, shape.m); ++r) {
        cursors.push_back(rows.Row(r));
      }
      for (int64_t step = 0; step < shape.steps(); ++step) {
        const int64_t at = strip * shape.steps() + step;
        const int columns =
            static_cast<int>(std::clamp<int64_t>(shape.k - step * kStepK, 0, kStepK));
        const size_t count = columns > 0 ? cursors.size() : 0;
        if (tiles != nullptr) {
          uint16_t* tile = tiles + at * kTileSize;
          std::memset(tile, 0, kTileSize * sizeof(uint16_t));
          for (size_t r = 0; r < count; ++r) {
            LoadRow(cursors[r], columns, tile + 4 * r * kStreamPositions);
          }
        } else {
          uint16_t* mask = masks + at * kStreams;
          std::memset(mask, 0, kStreams * sizeof(uint16_t));
          for (size_t r = 0; r < count; ++r) {
            LoadRowMask(cursors[r], columns, rows.has_zeros(), mask + 4 * r);
          }
        }
      }
    }
  };
  return {load, false};
}

int64_t LscdPlan(const StripLoader& strips, const LscdShape& shape, const ParallelFor& parallel_for,
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
  Scratch scratch(shape.chain_strips() * steps * kStreams * sizeof(uint16_t));
  parallel_for.run(chains, [&](int64_t i) {
    const Chain chain = ChainStrips(shape, i);
    const Scratch::Lease lease(scratch);
    auto* masks = lease.data<uint16_t>();
    strips.load(chain.first, chain.strips, nullptr, masks);
    segments[i] = kernels.plan_chain(masks, chain.strips * steps, steps, shape.spread(),
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

void LscdFill(const StripLoader& strips, const LscdShape& shape, const ParallelFor& parallel_for,
              const uint32_t* bitmap, const uint32_t* entries, int64_t segments, uint32_t* values) {
  if (segments == 0) return;
  const LscdKernels& kernels = Kernels();
  const int64_t steps = shape.steps(), chains = shape.chains();
  const int64_t bitmap_words = shape.groups() * kLanes * kGroupSteps;
  const int64_t entries_words = shape.entries() * kEntryWords;
  const int64_t at_once = strips.by_chain ? shape.chain_strips() : 1;
  Scratch scratch(at_once * steps * kTileSize * sizeof(uint16_t));
  parallel_for.run(chains, [&](int64_t i) {
    const Chain chain = ChainStrips(shape, i);
    const int64_t begin = entries[chain.first * entries_words];
    const int64_t end =
        i + 1 < chains ? entries[(chain.first + chain.strips) * entries_words] : segments;
    if (begin == end) return;
    const Scratch::Lease lease(scratch);
    auto* tiles = lease.data<uint16_t>();
    int64_t done = 0;
    const auto next = [&](const uint16_t** next_tiles) {
      const int64_t count = std::min(at_once, chain.strips - done);
      strips.load(chain.first + done, count, tiles, nullptr);
      done += count;
      *next_tiles = tiles;
      return count * steps;
    };
    kernels.fill_chain(next, chain.strips * steps, bitmap + chain.first * bitmap_words, end - begin,
                       values + begin * kSegmentSize);
  });
}

}  // namespace flashjax
