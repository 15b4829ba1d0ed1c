// The host packer for Python, on NumPy arrays.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/numpy_arrays.h"
#include "cpu/lscd_matmul.h"
#include "cpu/lscd_pack.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace nb = nanobind;

void BindPack(nb::module_& m);

namespace {

using flashjax::LscdShape;

using flashjax::Empty;
using flashjax::Input;

nb::tuple PackStrips(const flashjax::StripLoader& strips, const LscdShape& shape,
                     const flashjax::ParallelFor& parallel_for) {
  const auto bitmap =
      Empty<uint32_t>(shape.strips(), shape.groups(), flashjax::kLanes, flashjax::kGroupSteps);
  const auto entries = Empty<uint32_t>(shape.strips(), shape.entries(), flashjax::kEntryWords);
  const auto counts = Empty<uint32_t>(shape.strips());
  int64_t segments;
  {
    nb::gil_scoped_release release;
    segments =
        flashjax::LscdPlan(strips, shape, parallel_for, bitmap.data, entries.data, counts.data);
  }
  const auto values = Empty<uint32_t>(segments, flashjax::kSegmentWords, flashjax::kLanes);
  {
    nb::gil_scoped_release release;
    flashjax::LscdFill(strips, shape, parallel_for, bitmap.data, entries.data, segments,
                       values.data);
  }
  return nb::make_tuple(bitmap.array, entries.array, values.array, counts.array);
}

nb::tuple Pack(const Input<uint16_t, 2>& dense, int threads, bool for_few_tokens) {
  const LscdShape shape{static_cast<int64_t>(dense.shape(1)), static_cast<int64_t>(dense.shape(0)),
                        for_few_tokens};
  return PackStrips(flashjax::DenseStrips(dense.data(), shape), shape,
                    flashjax::OwnThreads(threads));
}

// What stored rows are made of, for Python: (bitmap, values, number of rows).
using Part = std::tuple<Input<uint8_t, 1>, Input<uint16_t, 1>, int64_t>;
using Order = std::optional<Input<int64_t, 1>>;

// Raises ValueError for arrays that do not belong together; nothing beyond them is read.
flashjax::SparseRows MakeRows(const std::vector<Part>& parts, int64_t k, const Order& order,
                              const flashjax::ParallelFor& parallel_for) {
  std::vector<flashjax::SparseRows::Part> out;
  int64_t rows = 0;
  for (const auto& [bitmap, values, count] : parts) {
    const auto bytes = static_cast<int64_t>(bitmap.size());
    int64_t bits = 0;
    if (k < 0 || count < 0 || __builtin_mul_overflow(count, k, &bits) ||
        bytes != bits / 8 + (bits % 8 != 0)) {
      throw nb::value_error("stored rows: expected a bitmap of ceil(rows k / 8) bytes");
    }
    out.push_back(
        {bitmap.data(), bytes, values.data(), static_cast<int64_t>(values.size()), count});
    rows += count;
  }
  std::vector<int64_t> places;
  if (order) places.assign(order->data(), order->data() + order->size());
  for (const int64_t row : places) {
    if (row < 0 || row >= rows) throw nb::value_error("stored rows: order is out of range");
  }
  const auto result = [&] {
    nb::gil_scoped_release release;
    return flashjax::SparseRows(std::move(out), k, std::move(places), parallel_for);
  }();
  if (!result.fits()) {
    throw nb::value_error("stored rows: expected as many values as bits that are set");
  }
  return result;
}

nb::tuple PackRows(const std::vector<Part>& parts, int64_t k, const Order& order, int threads) {
  const auto parallel_for = flashjax::OwnThreads(threads);
  const auto rows = MakeRows(parts, k, order, parallel_for);
  return PackStrips(flashjax::RowStrips(rows), LscdShape{rows.rows(), k}, parallel_for);
}

nb::object DecodeRows(const std::vector<Part>& parts, int64_t k, const Order& order, int threads) {
  const auto parallel_for = flashjax::OwnThreads(threads);
  const auto rows = MakeRows(parts, k, order, parallel_for);
  const auto dense = Empty<uint16_t>(rows.rows(), k);
  {
    nb::gil_scoped_release release;
    flashjax::DecodeRows(rows, parallel_for, dense.data);
  }
  return dense.array;
}

template <typename Array>
void Check(const char* operand, const Array& array, std::initializer_list<int64_t> sizes) {
  bool equal = array.ndim() == sizes.size();
  size_t i = 0;
  for (const int64_t size : sizes) {
    equal = equal && (size < 0 || static_cast<int64_t>(array.shape(i)) == size);
    ++i;
  }
  if (equal) return;
  std::string expected, got;
  for (const int64_t size : sizes) {
    expected += (expected.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
  }
  for (size_t axis = 0; axis < array.ndim(); ++axis) {
    got += (axis == 0 ? "" : ", ") + std::to_string(array.shape(axis));
  }
  throw nb::value_error(
      (std::string("unpack: ") + operand + ": expected shape (" + expected + "), got (" + got + ")")
          .c_str());
}

nb::object Unpack(const Input<uint32_t, 4>& bitmap, const Input<uint32_t, 3>& entries,
                  const Input<uint32_t, 3>& values, int64_t k, int64_t m, int threads) {
  if (k < 0 || m < 0) throw nb::value_error("unpack: k and m must not be negative");
  const LscdShape shape{m, k};
  Check("bitmap", bitmap,
        {shape.strips(), shape.groups(), flashjax::kLanes, flashjax::kGroupSteps});
  Check("entries", entries, {shape.strips(), shape.entries(), flashjax::kEntryWords});
  Check("values", values, {-1, flashjax::kSegmentWords, flashjax::kLanes});
  const auto dense = Empty<uint16_t>(k, m);
  {
    nb::gil_scoped_release release;
    flashjax::LscdUnpack({shape, flashjax::HalfType::kFloat16, bitmap.data(), entries.data(),
                          values.data(), static_cast<int64_t>(values.shape(0))},
                         false, dense.data, flashjax::OwnThreads(threads));
  }
  return dense.array;
}

}  // namespace

void BindPack(nb::module_& m) {
  if (const char* unknown = flashjax::UnknownSimdVariable()) {
    throw nb::import_error(
        (std::string("FLASHJAX_CPU_SIMD: expected portable, avx2 or avx512, got ") + unknown)
            .c_str());
  }
  m.def(
      "pack", &Pack, nb::arg("dense").noconvert(), nb::arg("threads") = 0,
      nb::arg("for_few_tokens") = false,
      "Packs (K, M) uint16 bit patterns, C-contiguous: (bitmap, entries, values, counts), uint32.\n"
      "The result does not depend on `threads` (0: one per core).");
  m.def("pack_rows", &PackRows, nb::arg("parts"), nb::arg("k"),
        nb::arg("order").none() = nb::none(), nb::arg("threads") = 0,
        "The same for an (M, K) weight as checkpoints store it: parts of (bitmap uint8, values\n"
        "uint16, number of rows), whose rows follow each other or stand in the order int64 (M,).");
  m.def("decode_rows", &DecodeRows, nb::arg("parts"), nb::arg("k"),
        nb::arg("order").none() = nb::none(), nb::arg("threads") = 0,
        "The (M, K) uint16 bit patterns of such a weight.");
  m.def("unpack", &Unpack, nb::arg("bitmap").noconvert(), nb::arg("entries").noconvert(),
        nb::arg("values").noconvert(), nb::arg("k"), nb::arg("m"), nb::arg("threads") = 0,
        "The (K, M) uint16 bit patterns of packed arrays.");
  m.def(
      "simd", [] { return std::string(flashjax::SimdName(flashjax::ActiveSimd())); },
      "The instruction set in use: 'avx512', 'avx2' or 'portable'. FLASHJAX_CPU_SIMD lowers it.");
  m.def(
      "set_simd",
      [](const std::string& name) {
        if (!flashjax::SetSimd(name.c_str())) {
          throw nb::value_error(("set_simd: expected 'portable', 'avx2' or 'avx512', one that this "
                                 "machine has, got '" +
                                 name + "'")
                                    .c_str());
        }
      },
      nb::arg("name"), "Chooses the instruction set for the calls that follow, for tests.");
}
