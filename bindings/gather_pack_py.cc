// The host packer of the gather layout for Python, on NumPy arrays.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bindings/numpy_arrays.h"
#include "cpu/gather_pack.h"
#include "cpu/parallel.h"

namespace nb = nanobind;

void BindGatherPack(nb::module_& m);

namespace {

using flashjax::Empty;
using flashjax::Input;
using flashjax::gather::GatherShape;

nb::object Pack(const Input<uint16_t, 2>& dense, int threads) {
  const GatherShape shape{static_cast<int64_t>(dense.shape(1)),
                          static_cast<int64_t>(dense.shape(0))};
  if (!shape.fits()) return nb::none();
  const auto entries = Empty<uint32_t>(shape.strips() + 1, shape.entry_words());
  const auto counts = Empty<uint32_t>(shape.strips());
  const auto parallel_for = flashjax::OwnThreads(threads);
  std::optional<std::vector<flashjax::gather::Block>> blocks;
  {
    nb::gil_scoped_release release;
    blocks =
        flashjax::gather::GatherPack(dense.data(), shape, parallel_for, entries.data, counts.data);
  }
  if (!blocks) return nb::none();
  const int64_t chunks = entries.data[shape.strips() * shape.entry_words()];
  const auto values = Empty<uint32_t>(chunks, flashjax::gather::kLanes, 4);
  const auto bitmap = Empty<uint32_t>(chunks, flashjax::gather::kLanes, 2);
  {
    nb::gil_scoped_release release;
    parallel_for.run(static_cast<int64_t>(blocks->size()), [&](int64_t b) {
      const int64_t strip = b * (flashjax::gather::kBlockRows / flashjax::gather::kLanes);
      const int64_t first =
          int64_t{entries.data[strip * shape.entry_words()]} * flashjax::gather::kLanes;
      auto& block = (*blocks)[b];
      std::copy(block.values.begin(), block.values.end(), values.data + first * 4);
      std::copy(block.columns.begin(), block.columns.end(), bitmap.data + first * 2);
      block = {};
    });
  }
  return nb::make_tuple(bitmap.array, entries.array, values.array, counts.array);
}

}  // namespace

void BindGatherPack(nb::module_& m) {
  m.def(
      "gather_pack", &Pack, nb::arg("dense").noconvert(), nb::arg("threads") = 0,
      "Packs (K, M) uint16 bit patterns, C-contiguous, into the gather layout: (bitmap, entries,\n"
      "values, counts), uint32; None if the layout cannot hold them. The result does not depend\n"
      "on `threads` (0: one per core).");
}
