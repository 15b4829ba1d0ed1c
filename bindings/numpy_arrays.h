// NumPy arrays as arguments and results of the functions for Python.
#ifndef FLASHJAX_BINDINGS_NUMPY_ARRAYS_H_
#define FLASHJAX_BINDINGS_NUMPY_ARRAYS_H_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace flashjax {

namespace nb = nanobind;

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

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_NUMPY_ARRAYS_H_
