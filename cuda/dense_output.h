// Where expanded weights go.
#ifndef FLASHJAX_CUDA_DENSE_OUTPUT_H_
#define FLASHJAX_CUDA_DENSE_OUTPUT_H_

#include <cstdint>

namespace flashjax {

struct DenseOutput {
  uint16_t* data;
  int64_t rows, columns;
  bool aligned;  // rows can be written 16 bytes at a time
};

inline DenseOutput MakeDenseOutput(uint16_t* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0};
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_DENSE_OUTPUT_H_
