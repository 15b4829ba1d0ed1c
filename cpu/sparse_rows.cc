#include "cpu/sparse_rows.h"

#include <atomic>
#include <functional>
#include <utility>

#include "cpu/ceil_div.h"

namespace flashjax {
namespace {

constexpr int64_t kRowsAtATime = 64;
constexpr int64_t kValuesAtATime = 1 << 16;

void ForRows(int64_t rows, const ParallelFor& parallel_for,
             const std::function<void(int64_t row)>& body) {
  parallel_for.run(CeilDiv(rows, kRowsAtATime), [&](int64_t i) {
    const int64_t end = std::min(rows, (i + 1) * kRowsAtATime);
    for (int64_t row = i * kRowsAtATime; row < end; ++row) body(row);
  });
}

bool HasZeros(const SparseRows::Part& part, const ParallelFor& parallel_for) {
  std::atomic<bool> found{false};
  parallel_for.run(CeilDiv(part.value_count, kValuesAtATime), [&](int64_t i) {
    const int64_t end = std::min(part.value_count, (i + 1) * kValuesAtATime);
    bool any = false;
    for (int64_t v = i * kValuesAtATime; v < end; ++v) any |= (part.values[v] & 0x7FFF) == 0;
    if (any) found = true;
  });
  return found;
}

}  // namespace

SparseRows::SparseRows(std::vector<Part> parts, int64_t k, std::vector<int64_t> order,
                       const ParallelFor& parallel_for)
    : parts_(std::move(parts)), k_(k), order_(std::move(order)) {
  for (const Part& part : parts_) {
    rows_ += part.rows;
    has_zeros_ = has_zeros_ || HasZeros(part, parallel_for);
  }
  if (!order_.empty()) rows_ = static_cast<int64_t>(order_.size());
  for (size_t p = 0; p < parts_.size() && k_ > 0; ++p) {
    for (int64_t row = 0; row < parts_[p].rows; ++row) {
      starts_.push_back({static_cast<int64_t>(p), row, 0});
    }
  }
  ForRows(static_cast<int64_t>(starts_.size()), parallel_for, [&](int64_t i) {
    Start& start = starts_[i];
    const Part& part = parts_[start.part];
    for (int64_t column = 0; column < k_; column += 64) {
      const int count = static_cast<int>(std::min<int64_t>(64, k_ - column));
      start.value += __builtin_popcountll(
          ReadBits(part.bitmap, part.bitmap_bytes, start.row * k_ + column, count));
    }
  });
  // From the values of each row to those before it.
  int64_t next = 0;
  for (const Part& part : parts_) {
    int64_t before = 0;
    for (int64_t row = 0; row < part.rows && k_ > 0; ++row, ++next) {
      before += std::exchange(starts_[next].value, before);
    }
    fits_ = fits_ && before == part.value_count;
  }
}

void DecodeRows(const SparseRows& rows, const ParallelFor& parallel_for, uint16_t* dense) {
  const int64_t k = rows.k();
  if (k == 0) return;
  ForRows(rows.rows(), parallel_for, [&](int64_t i) {
    SparseRows::Cursor cursor = rows.Row(i);
    std::fill(dense + i * k, dense + (i + 1) * k, uint16_t{0});
    for (int64_t column = 0; column < k; column += 64) {
      uint16_t* out = dense + i * k + column;
      cursor.Read(static_cast<int>(std::min<int64_t>(64, k - column)),
                  [out](int place, uint16_t value) { out[place] = value; });
    }
  });
}

}  // namespace flashjax
