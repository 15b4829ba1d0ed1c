// NumPy arrays as arguments and results of the functions for Python.
#ifndef FLASHJAX_BINDINGS_NUMPY_ARRAYS_H_
#define FLASHJAX_BINDINGS_NUMPY_ARRAYS_H_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <memory>

#include "cpu/buffer.h"

namespace flashjax {

namespace nb = nanobind;

template <typename T, int kRank>
using Input = nb::ndarray<const T, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;

template <typename T>
struct Output {
  nb::object array;
  T* data;
};

// A result, not initialised.
template <typename T, typename... Sizes>
Output<T> Empty(Sizes... sizes) {
  auto buffer = std::make_unique<Buffer>((sizeof(T) * ... * static_cast<size_t>(sizes)));
  T* data = static_cast<T*>(buffer->data());
  const nb::capsule owner(buffer.get(), [](void* p) noexcept { delete static_cast<Buffer*>(p); });
  buffer.release();
  nb::ndarray<nb::numpy, T> array(data, {static_cast<size_t>(sizes)...}, owner);
  return {nb::cast(array), data};
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_NUMPY_ARRAYS_H_
