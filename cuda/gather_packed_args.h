// A W in the gather layout as the launchers take it: the arrays of cpu/gather_layout.h on the
// device.
#ifndef FLASHJAX_CUDA_GATHER_PACKED_ARGS_H_
#define FLASHJAX_CUDA_GATHER_PACKED_ARGS_H_

#include <cstdint>

namespace flashjax::gather {

struct GatherPackedArgs {
  const uint32_t* bitmap;
  const uint32_t* entries;
  const uint32_t* values;
  // Of a stack of matrices of one shape: the index of the one meant, on the device, how many there
  // are, and the chunks of each.
  const int32_t* layer = nullptr;
  int64_t layers = 0;
  int64_t chunks = 0;
};

}  // namespace flashjax::gather

#endif  // FLASHJAX_CUDA_GATHER_PACKED_ARGS_H_
