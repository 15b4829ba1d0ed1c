// The bias of an output feature, as the kernels of all layouts get it.
#ifndef FLASHJAX_CUDA_BIAS_CUH_
#define FLASHJAX_CUDA_BIAS_CUH_

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

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_BIAS_CUH_
