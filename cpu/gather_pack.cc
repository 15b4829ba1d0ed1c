#include "cpu/gather_pack.h"

#include <algorithm>
#include <climits>
#include <numeric>
#include <utility>

namespace flashjax::gather {
namespace {

constexpr int kClasses = 8;  // columns modulo 8: the places of x that conflict
constexpr int kQuarter = 8;  // lanes that read x at a time

struct Element {
  int32_t column;
  uint16_t value;
};

using Row = std::vector<Element>;

bool IsZero(uint16_t bits) { return (bits & 0x7fff) == 0; }

// The nonzeros of rows [first, first + rows.size()) of W, which are columns of `dense`.
void LoadRows(const uint16_t* dense, const GatherShape& shape, int64_t first,
              std::vector<Row>& rows) {
  for (int64_t k = 0; k < shape.k; ++k) {
    const uint16_t* line = dense + k * shape.m + first;
    for (size_t r = 0; r < rows.size(); ++r) {
      if (!IsZero(line[r])) rows[r].push_back({static_cast<int32_t>(k), line[r]});
    }
  }
}

// A lane's nonzeros, each to be taken once, and what it has taken.
class Lane {
 public:
  explicit Lane(const Row& row) : left_(row.size()) {
    for (const Element& e : row) queues_[e.column % kClasses].push_back(e);
    for (int c = 0; c < kClasses; ++c) FindHead(c);
  }

  size_t left() const { return left_; }
  const Row& taken() const { return taken_; }

  // The classes of which it may take one now; none if a zero has to come first, or nothing is left.
  unsigned Classes() const {
    const int base = *std::min_element(heads_, heads_ + kClasses);
    if (base == INT_MAX || base - current_ > kReach) return 0;
    const int limit = std::min(base + kWindow, current_ + kReach);
    unsigned classes = 0;
    for (int c = 0; c < kClasses; ++c) classes |= unsigned{heads_[c] <= limit} << c;
    return classes;
  }

  // Of the classes in a set, the one with the least column, or -1.
  int Oldest(unsigned classes) const {
    int best = -1, column = INT_MAX;
    for (int c = 0; c < kClasses; ++c) {
      if ((classes >> c & 1) != 0 && heads_[c] < column) {
        column = heads_[c];
        best = c;
      }
    }
    return best;
  }

  void Take(int c) {
    Emit(queues_[c][next_[c]++]);
    FindHead(c);
    --left_;
  }

  // A zero as near to a column as a byte reaches.
  void TakeZero(int column) { Emit({std::min(column, current_ + kReach), 0}); }

 private:
  void FindHead(int c) {
    heads_[c] = next_[c] < queues_[c].size() ? queues_[c][next_[c]].column : INT_MAX;
  }

  void Emit(Element e) {
    current_ = e.column;
    taken_.push_back(e);
  }

  Row queues_[kClasses];
  size_t next_[kClasses] = {};
  int heads_[kClasses];
  size_t left_;
  int current_ = 0;
  Row taken_;
};

// Gives as many of 8 lanes as possible a class of their own (Kuhn's algorithm).
class Matching {
 public:
  Matching() {
    std::fill(lane_of_, lane_of_ + kClasses, -1);
    std::fill(class_of_, class_of_ + kQuarter, -1);
  }

  int class_of(int lane) const { return class_of_[lane]; }
  unsigned taken() const { return taken_; }

  void Assign(int lane, int c) {
    lane_of_[c] = lane;
    class_of_[lane] = c;
    taken_ |= 1u << c;
  }

  // Finds a class for a lane by moving others; `classes` are those that each may have.
  bool Augment(int lane, const unsigned* classes, unsigned& seen) {
    for (int c = 0; c < kClasses; ++c) {
      if ((classes[lane] & ~seen & 1u << c) == 0) continue;
      seen |= 1u << c;
      if (lane_of_[c] < 0 || Augment(lane_of_[c], classes, seen)) {
        Assign(lane, c);
        return true;
      }
    }
    return false;
  }

 private:
  int lane_of_[kClasses], class_of_[kQuarter];
  unsigned taken_ = 0;
};

// Every one of 8 lanes takes one; those with more left choose first.
void TakeStep(Lane* lanes, const int* order) {
  unsigned classes[kQuarter];
  for (int l = 0; l < kQuarter; ++l) classes[l] = lanes[l].Classes();
  Matching matching;
  for (int i = 0; i < kQuarter; ++i) {
    const int c = lanes[order[i]].Oldest(classes[order[i]] & ~matching.taken());
    if (c >= 0) matching.Assign(order[i], c);
  }
  for (int i = 0; i < kQuarter; ++i) {
    unsigned seen = 0;
    if (matching.class_of(order[i]) < 0) matching.Augment(order[i], classes, seen);
  }
  for (int l = 0; l < kQuarter; ++l) {
    const int c = matching.class_of(l) >= 0 ? matching.class_of(l) : lanes[l].Oldest(classes[l]);
    if (c >= 0) {
      lanes[l].Take(c);
    } else if (lanes[l].left() > 0) {
      lanes[l].TakeZero(INT_MAX);
    }
  }
}

// Orders the rows of a strip; afterwards all lanes have taken whole chunks, equally many.
int64_t Schedule(std::vector<Lane>& lanes) {
  size_t longest = 0;
  for (int first = 0; first < kLanes; first += kQuarter) {
    Lane* quarter = &lanes[first];
    int order[kQuarter];
    std::iota(order, order + kQuarter, 0);
    const auto sort = [&] {
      std::stable_sort(order, order + kQuarter,
                       [&](int a, int b) { return quarter[a].left() > quarter[b].left(); });
    };
    for (sort(); quarter[order[0]].left() > 0; sort()) TakeStep(quarter, order);
    for (int l = 0; l < kQuarter; ++l) longest = std::max(longest, quarter[l].taken().size());
  }
  const int64_t chunks = CeilDiv(static_cast<int64_t>(longest), kChunkValues);
  // The zeros at a row's end keep up with the other rows: a panel holds some columns of x alone.
  std::vector<int> reached(chunks * kChunkValues, 0);
  for (const Lane& lane : lanes) {
    for (size_t i = 0; i < lane.taken().size(); ++i) {
      reached[i] = std::max(reached[i], lane.taken()[i].column);
    }
  }
  for (size_t i = 1; i < reached.size(); ++i) reached[i] = std::max(reached[i], reached[i - 1]);
  for (Lane& lane : lanes) {
    for (size_t i = lane.taken().size(); i < reached.size(); ++i) lane.TakeZero(reached[i]);
  }
  return chunks;
}

struct Window {
  int begin = INT_MAX, end = 0;

  void Add(int b, int e) {
    begin = std::min(begin, b);
    end = std::max(end, e);
  }
};

// Appends a strip's chunks to its block; writes the columns before its units and what its panels
// reach.
void Store(std::vector<Lane>& lanes, int64_t chunks, int units, Block& block, uint16_t* starts,
           Window* windows) {
  const size_t first = block.values.size() / (kLanes * 4);
  block.values.resize(block.values.size() + chunks * kLanes * 4);
  block.columns.resize(block.columns.size() + chunks * kLanes * 2);
  auto* values = reinterpret_cast<uint16_t*>(block.values.data()) + first * kLanes * kChunkValues;
  auto* columns = reinterpret_cast<int8_t*>(block.columns.data()) + first * kLanes * kChunkValues;
  for (int l = 0; l < kLanes; ++l) {
    const Row& row = lanes[l].taken();
    int before = 0;
    for (int64_t i = 0; i < chunks * kChunkValues; ++i) {
      const int64_t at = (i / kChunkValues * kLanes + l) * kChunkValues + i % kChunkValues;
      values[at] = row[i].value;
      columns[at] = static_cast<int8_t>(row[i].column - before);
      before = row[i].column;
    }
    for (int u = 0; u < units; ++u) {
      const int64_t begin = chunks * u / units * kChunkValues;
      const int64_t end = chunks * (u + 1) / units * kChunkValues;
      starts[u * kLanes + l] = static_cast<uint16_t>(begin > 0 ? row[begin - 1].column : 0);
      for (int64_t i = begin; i < end; ++i) {
        windows[u / kPanelUnits].Add(row[i].column, row[i].column + 1);
      }
    }
  }
}

}  // namespace

std::optional<std::vector<Block>> GatherPack(const uint16_t* dense, const GatherShape& shape,
                                             const ParallelFor& parallel_for, uint32_t* entries,
                                             uint32_t* counts) {
  const int64_t strips = shape.strips(), words = shape.entry_words();
  const int panels = shape.panels(), units = shape.units();
  std::vector<Block> blocks(CeilDiv(shape.m, kBlockRows));
  std::vector<Window> windows(blocks.size() * panels);
  std::fill(entries, entries + (strips + 1) * words, 0);
  parallel_for.run(static_cast<int64_t>(blocks.size()), [&](int64_t b) {
    const int64_t first = b * kBlockRows;
    std::vector<Row> rows(std::min<int64_t>(kBlockRows, shape.m - first));
    LoadRows(dense, shape, first, rows);
    rows.resize(CeilDiv(static_cast<int64_t>(rows.size()), kLanes) * kLanes);
    std::vector<int64_t> order(rows.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return rows[i].size() > rows[j].size(); });
    for (int64_t s = 0; s < static_cast<int64_t>(rows.size()) / kLanes; ++s) {
      const int64_t strip = b * (kBlockRows / kLanes) + s;
      uint32_t* entry = entries + strip * words;
      std::vector<Lane> lanes;
      counts[strip] = 0;
      for (int l = 0; l < kLanes; ++l) {
        const int64_t row = order[s * kLanes + l];
        lanes.emplace_back(rows[row]);
        entry[1 + l] = static_cast<uint32_t>(first + row);
        counts[strip] += static_cast<uint32_t>(rows[row].size());
      }
      const int64_t chunks = Schedule(lanes);
      entry[0] = static_cast<uint32_t>(chunks);
      Store(lanes, chunks, units, blocks[b], reinterpret_cast<uint16_t*>(entry + 1 + kLanes),
            &windows[b * panels]);
    }
  });
  uint32_t total = 0;
  for (int64_t strip = 0; strip <= strips; ++strip) {
    total += std::exchange(entries[strip * words], total);
  }
  uint32_t* last = entries + strips * words;
  for (int p = 0; p < panels; ++p) {
    Window all;
    for (size_t b = 0; b < blocks.size(); ++b) {
      all.Add(windows[b * panels + p].begin, windows[b * panels + p].end);
    }
    if (all.end == 0) continue;
    last[1 + 2 * p] = static_cast<uint32_t>(all.begin / kClasses * kClasses);
    last[2 + 2 * p] = static_cast<uint32_t>(CeilDiv(all.end, kClasses) * kClasses);
    if (last[2 + 2 * p] - last[1 + 2 * p] > kPanelColumns) return std::nullopt;
  }
  return blocks;
}

}  // namespace flashjax::gather
