// A sparse W as checkpoints store it: one bit for each element, row by row, and the values of those
// that are set, in the same order.
#ifndef FLASHJAX_CPU_SPARSE_ROWS_H_
#define FLASHJAX_CPU_SPARSE_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"

namespace flashjax {

// Up to 64 bits of a bitmap of so many bytes; those beyond its end are 0.
inline uint64_t ReadBits(const uint8_t* bitmap, int64_t bytes, int64_t bit, int count) {
  const int64_t first = bit / 8, left = bytes - first;
  const int shift = static_cast<int>(bit % 8);
  uint64_t bits = 0;
  std::memcpy(&bits, bitmap + first, static_cast<size_t>(std::clamp<int64_t>(left, 0, 8)));
  bits >>= shift;
  if (shift > 0 && left > 8) bits |= uint64_t{bitmap[first + 8]} << (64 - shift);
  return count < 64 ? bits & ((uint64_t{1} << count) - 1) : bits;
}

class SparseRows {
 public:
  // Rows of k columns that are stored together.
  struct Part {
    const uint8_t* bitmap;
    int64_t bitmap_bytes;  // at least those of its rows
    const uint16_t* values;
    int64_t value_count;
    int64_t rows;
  };

  // Reads on in a row; stays within the values only if `fits()`.
  class Cursor {
   public:
    Cursor(const Part& part, int64_t bit, int64_t value)
        : part_(&part), bit_(bit), value_(part.values + value) {}

    // Calls put(column, value) for what is stored of the next `count` columns, up to 64.
    template <typename Put>
    void Read(int count, const Put& put) {
      const uint16_t* value = value_;
      for (uint64_t bits = ReadMask(count); bits != 0; bits &= bits - 1) {
        put(__builtin_ctzll(bits), *value++);
      }
      value_ = value;
    }
    // Which of them are stored; their values are not passed by.
    uint64_t ReadMask(int count) {
      const uint64_t bits = ReadBits(part_->bitmap, part_->bitmap_bytes, bit_, count);
      bit_ += count;
      return bits;
    }

   private:
    const Part* part_;
    int64_t bit_;
    const uint16_t* value_;
  };

  // The parts' rows one after the other; or, if `order` is not empty, those that it names, in its
  // order.
  SparseRows(std::vector<Part> parts, int64_t k, std::vector<int64_t> order,
             const ParallelFor& parallel_for);

  int64_t rows() const { return rows_; }
  int64_t k() const { return k_; }
  // Whether every part has as many values as bits.
  bool fits() const { return fits_; }
  // Whether some of the values are zeros.
  bool has_zeros() const { return has_zeros_; }

  // There have to be columns.
  Cursor Row(int64_t i) const {
    const Start& start = starts_[order_.empty() ? i : order_[i]];
    return {parts_[start.part], start.row * k_, start.value};
  }

 private:
  struct Start {
    int64_t part, row, value;
  };

  std::vector<Part> parts_;
  int64_t k_, rows_ = 0;
  std::vector<int64_t> order_;
  std::vector<Start> starts_;  // of all rows; none if there are no columns
  bool fits_ = true, has_zeros_ = false;
};

// Writes dense, (rows, k), whole.
void DecodeRows(const SparseRows& rows, const ParallelFor& parallel_for, uint16_t* dense);

}  // namespace flashjax

#endif  // FLASHJAX_CPU_SPARSE_ROWS_H_
