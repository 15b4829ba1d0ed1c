// What becomes of the sums of a product, for the launchers of all layouts.
#ifndef FLASHJAX_CUDA_EPILOGUE_ARGS_H_
#define FLASHJAX_CUDA_EPILOGUE_ARGS_H_

namespace flashjax {

struct EpilogueArgs {
  void* y;           // (n, m), the type of x or float32; 4-byte aligned
  const void* bias;  // (m,), the type of x or float32; or nullptr
  bool is_float_output;
  bool is_float_bias;
  bool is_stacked_bias;  // (layers, m): a bias for each matrix of the stack
  bool has_relu;         // y is max(0, x W^T + bias)
};

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_EPILOGUE_ARGS_H_
