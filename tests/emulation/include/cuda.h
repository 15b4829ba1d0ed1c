// Tensor maps of two dimensions, as the CUDA driver makes them.
#ifndef FLASHJAX_TESTS_EMULATION_CUDA_H_
#define FLASHJAX_TESTS_EMULATION_CUDA_H_

#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
  uint8_t* data;
  uint64_t columns, rows, row_bytes;
  uint32_t box_columns, box_rows;
};

#endif  // FLASHJAX_TESTS_EMULATION_CUDA_H_
