// What becomes of a sum before it is rounded, in the kernels of all layouts.
#ifndef FLASHJAX_CUDA_EPILOGUE_CUH_
#define FLASHJAX_CUDA_EPILOGUE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/epilogue_args.h"

namespace flashjax {

struct Epilogue {
  void* y;           // (n, m), row-major
  const void* bias;  // (m,), or one for each matrix of a stack; or nullptr
  int bias_stride;   // between those of a stack, else 0
  bool is_float;     // y is float32 instead of the weight's type
  bool is_float_bias;
  bool has_relu;
};

inline Epilogue MakeEpilogue(const EpilogueArgs& args, int64_t m) {
  return {args.y,
          args.bias,
          args.is_stacked_bias ? static_cast<int>(m) : 0,
          args.is_float_output,
          args.is_float_bias,
          args.has_relu};
}

__device__ __forceinline__ float ToFloat(__half v) { return __half2float(v); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }

// That of a row which exists.
template <typename T>
__device__ __forceinline__ float LoadBias(const Epilogue& epilogue, int layer, int row) {
  if (epilogue.bias == nullptr) return 0.0f;
  const int64_t index = int64_t{layer} * epilogue.bias_stride + row;
  return epilogue.is_float_bias ? static_cast<const float*>(epilogue.bias)[index]
                                : ToFloat(static_cast<const T*>(epilogue.bias)[index]);
}

// NaN stays NaN.
__device__ __forceinline__ float Relu(float v) { return v < 0.0f ? 0.0f : v; }

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_EPILOGUE_CUH_
