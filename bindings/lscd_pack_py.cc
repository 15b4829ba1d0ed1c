// The host packer for Python, on NumPy arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

#include "cpu/lscd_pack.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace nb = nanobind;

void BindPack(nb::module_& m);

namespace {

using flashjax::LscdShape;

template <typename T, int kRank>
using Input = nb::ndarray<const T, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;

// NumPy allocates the results (it asks for huge pages); T is the dtype's C++ type.
template <typename T>
struct Output {
  nb::object array;
  T* data;
};

template <typename T, typename... Sizes>
Output<T> Empty(const char* dtype, Sizes... sizes) {
  nb::object array = nb::module_::import_("numpy").attr("empty")(nb::make_tuple(sizes...), dtype);
  T* data = nb::cast<nb::ndarray<T, nb::c_contig, nb::device::cpu>>(array).data();
  return {array, data};
}

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

}  // namespace

void BindPack(nb::module_& m) {
  m.def(
      "pack", &Pack, nb::arg("dense").noconvert(), nb::arg("threads") = 0,
      "Packs (K, M) uint16 bit patterns, C-contiguous: (bitmap, entries, values, counts), uint32.\n"
      "The result does not depend on `threads` (0: one per core).");
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
