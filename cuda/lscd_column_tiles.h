// How the columns of a product (rows of x) are divided into launches, and these into tiles.
#ifndef FLASHJAX_CUDA_LSCD_COLUMN_TILES_H_
#define FLASHJAX_CUDA_LSCD_COLUMN_TILES_H_

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "cpu/ceil_div.h"

namespace flashjax {

// A launch: so many columns, in tiles of a width that the kernel is compiled for.
struct ColumnTiles {
  int64_t columns;
  int width;
};

// What a tile of a width costs, in hundredths of a launch with one of 256 columns: geometric mean
// of seven layers with 60% zeros on an H200 (docs/kernel-log.md, section 21). A launch costs as
// much besides as so many elements of W with one tile: some 15 us.
struct TileCost {
  int width, cost;
};
inline constexpr TileCost kNarrowTiles[] = {{8, 31}, {16, 33}, {32, 36}, {64, 42}, {128, 60}};
inline constexpr TileCost kWideTile = {256, 94}, kWidestTile = {344, 120};
inline constexpr int64_t kLaunchElements = 20'000'000;

// The narrowest tile that takes n columns, which one of these does.
inline TileCost NarrowTile(int64_t n) {
  const TileCost* tile = kNarrowTiles;
  while (tile->width < n) ++tile;
  return *tile;
}

// The first launch of the cheapest plan that multiplies W, of so many elements, by n columns. A
// plan is all tiles of 344 columns, then up to three of 256, then a narrow one.
inline ColumnTiles NextWgmmaTiles(int64_t n, int64_t elements) {
  constexpr int kMostNarrow = kNarrowTiles[std::size(kNarrowTiles) - 1].width;
  const int64_t launch = 100 * kLaunchElements / std::max<int64_t>(elements, 1);
  ColumnTiles best{n, NarrowTile(std::min<int64_t>(n, kMostNarrow)).width};
  int64_t least = INT64_MAX;
  for (int wide = 0; n > kMostNarrow && wide <= 3; ++wide) {
    const int64_t left = std::max<int64_t>(n - wide * kWideTile.width, 0);
    for (int64_t widest = left / kWidestTile.width; widest <= CeilDiv(left, kWidestTile.width);
         ++widest) {
      const int64_t rest = left - widest * kWidestTile.width;
      if (rest > kMostNarrow) continue;
      int64_t cost = wide * kWideTile.cost + widest * kWidestTile.cost;
      cost += ((wide > 0) + (widest > 0)) * launch;
      if (rest > 0) cost += NarrowTile(rest).cost + launch;
      if (cost >= least) continue;
      least = cost;
      const TileCost& first = widest > 0 ? kWidestTile : kWideTile;
      best = {std::min(n, first.width * (widest > 0 ? widest : wide)), first.width};
    }
  }
  return best;
}

// The mma kernel takes a tile a launch.
inline ColumnTiles NextMmaTiles(int64_t n) {
  constexpr int kWidest = 32;
  n = std::min<int64_t>(n, kWidest);
  return {n, NarrowTile(n).width};
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_COLUMN_TILES_H_
