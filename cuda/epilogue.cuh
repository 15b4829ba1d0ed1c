// What becomes of a sum before it is rounded, in the kernels of all layouts.
#ifndef FLASHJAX_CUDA_EPILOGUE_CUH_
#define FLASHJAX_CUDA_EPILOGUE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashjax {

__device__ __forceinline__ float ToFloat(__half v) { return __half2float(v); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }

// One that is there, of T or float32.
template <typename T>
__device__ __forceinline__ float LoadBias(const void* bias, bool is_float, int64_t index) {
  return is_float ? static_cast<const float*>(bias)[index]
                  : ToFloat(static_cast<const T*>(bias)[index]);
}

// NaN stays NaN.
__device__ __forceinline__ float Relu(float v) { return v < 0.0f ? 0.0f : v; }

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_EPILOGUE_CUH_
