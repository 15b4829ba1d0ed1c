// The host packer for Python, on NumPy arrays.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <initializer_list>
#include <string>

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

nb::tuple Pack(const Input<uint16_t, 2>& dense, int threads) {
  const LscdShape shape{static_cast<int64_t>(dense.shape(1)), static_cast<int64_t>(dense.shape(0))};
  const auto bitmap = Empty<uint32_t>("uint32", shape.strips(), shape.groups(), flashjax::kLanes,
                                      flashjax::kGroupSteps);
  const auto entries =
      Empty<uint32_t>("uint32", shape.strips(), shape.entries(), flashjax::kEntryWords);
  const auto counts = Empty<uint32_t>("uint32", shape.strips());
  const auto parallel_for = flashjax::OwnThreads(threads);
  int64_t segments;
  {
    nb::gil_scoped_release release;
    segments = flashjax::LscdPlan(dense.data(), shape, parallel_for, bitmap.data, entries.data,
                                  counts.data);
  }
  const auto values =
      Empty<uint32_t>("uint32", segments, flashjax::kSegmentWords, flashjax::kLanes);
  {
    nb::gil_scoped_release release;
    flashjax::LscdFill(dense.data(), shape, parallel_for, bitmap.data, entries.data, segments,
                       values.data);
  }
  return nb::make_tuple(bitmap.array, entries.array, values.array, counts.array);
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
  const auto dense = Empty<uint16_t>("uint16", k, m);
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
      "Packs (K, M) uint16 bit patterns, C-contiguous: (bitmap, entries, values, counts), uint32.\n"
      "The result does not depend on `threads` (0: one per core).");
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
