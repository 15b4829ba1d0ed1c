// Tensor maps (sm_90) of row-major matrices of 16-bit elements.
#ifndef FLASHJAX_CUDA_COMMON_TENSOR_MAP_H_
#define FLASHJAX_CUDA_COMMON_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashjax {

inline constexpr int kTensorBox = 64;  // columns of a box: what the 128-byte swizzle takes

namespace tensor_map {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Through the runtime, so that the module loads where there is no driver.
inline EncodeTiled FindEncodeTiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled>(function);
}

}  // namespace tensor_map

// The map of a matrix whose rows follow each other, in boxes of kTensorBox columns with the
// 128-byte swizzle. `data` and its rows must be aligned to 16 bytes. Beyond the matrix a box reads
// zeros.
inline cudaError_t EncodeTensorMap(CUtensorMap& map, CUtensorMapDataType type, void* data,
                                   int64_t rows, int64_t columns, int box_rows) {
  static const tensor_map::EncodeTiled encode = tensor_map::FindEncodeTiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {kTensorBox, static_cast<cuuint32_t>(box_rows)}, ones[2] = {1, 1};
  const CUresult result =
      encode(&map, type, 2, data, size, stride, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_TENSOR_MAP_H_
