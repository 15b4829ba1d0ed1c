// Checks shared by the FFI handlers. Each message names the op, the operand, what was expected and
// what came.
#ifndef FLASHJAX_BINDINGS_FFI_HELPERS_H_
#define FLASHJAX_BINDINGS_FFI_HELPERS_H_

#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace flashjax {

// Returns the error of a check from the enclosing handler.
#define FLASHJAX_RETURN_IF_ERROR(expression)                                       \
  if (::xla::ffi::Error flashjax_error = (expression); flashjax_error.failure()) { \
    return flashjax_error;                                                         \
  }                                                                                \
  static_assert(true, "")

// NumPy's name of a dtype.
inline std::string DtypeName(::xla::ffi::DataType dtype) {
  using ::xla::ffi::DataType;
  switch (dtype) {
    case DataType::F16:
      return "float16";
    case DataType::BF16:
      return "bfloat16";
    case DataType::F32:
      return "float32";
    case DataType::F64:
      return "float64";
    case DataType::F8E4M3FN:
      return "float8_e4m3fn";
    case DataType::PRED:
      return "bool";
    case DataType::U8:
      return "uint8";
    case DataType::U16:
      return "uint16";
    case DataType::U32:
      return "uint32";
    case DataType::S32:
      return "int32";
    case DataType::S64:
      return "int64";
    default:
      return "XLA dtype " + std::to_string(static_cast<int>(dtype));
  }
}

// "(3, 4)"; -1 stands for any size.
template <typename Dimensions>
std::string ShapeText(const Dimensions& dimensions) {
  std::string text = "(";
  bool first = true;
  for (const int64_t size : dimensions) {
    if (!first) text += ", ";
    first = false;
    text += size < 0 ? "any" : std::to_string(size);
  }
  return text + ")";
}

inline ::xla::ffi::Error Mismatch(const char* op, const char* operand, const std::string& expected,
                                  const std::string& got) {
  return ::xla::ffi::Error::InvalidArgument(std::string(op) + ": " + operand + ": expected " +
                                            expected + ", got " + got);
}

// Buffer is an ffi::AnyBuffer, an ffi::Buffer<...> or a dereferenced ffi::Result of one.
template <typename Buffer>
::xla::ffi::Error CheckDtype(const char* op, const char* operand, const Buffer& buffer,
                             std::initializer_list<::xla::ffi::DataType> allowed) {
  std::string expected;
  for (const auto dtype : allowed) {
    if (buffer.element_type() == dtype) return ::xla::ffi::Error::Success();
    expected += (expected.empty() ? "" : " or ") + DtypeName(dtype);
  }
  return Mismatch(op, operand, "dtype " + expected, DtypeName(buffer.element_type()));
}

// A size of -1 in `expected` matches any size.
template <typename Buffer>
::xla::ffi::Error CheckShape(const char* op, const char* operand, const Buffer& buffer,
                             std::initializer_list<int64_t> expected) {
  const auto dimensions = buffer.dimensions();
  bool equal = dimensions.size() == expected.size();
  size_t i = 0;
  for (const int64_t size : expected) {
    if (!equal) break;
    equal = size < 0 || size == dimensions[i];
    ++i;
  }
  if (equal) return ::xla::ffi::Error::Success();
  return Mismatch(op, operand, "shape " + ShapeText(expected), ShapeText(dimensions));
}

// An index or a count, which stands on the device.
template <typename Buffer>
::xla::ffi::Error CheckInt32(const char* op, const char* operand, const Buffer& buffer) {
  FLASHJAX_RETURN_IF_ERROR(CheckDtype(op, operand, buffer, {::xla::ffi::DataType::S32}));
  return CheckShape(op, operand, buffer, {});
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_FFI_HELPERS_H_
