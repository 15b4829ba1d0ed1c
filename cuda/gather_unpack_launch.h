// Launching the unpacker of the gather layout.
#ifndef FLASHJAX_CUDA_GATHER_UNPACK_LAUNCH_H_
#define FLASHJAX_CUDA_GATHER_UNPACK_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/gather_packed_args.h"

namespace flashjax::gather {

// dense is W, (m, k), or its transpose, (k, m): 16-bit patterns.
cudaError_t LaunchGatherUnpack(const GatherPackedArgs& packed, int64_t m, int64_t k,
                               bool transposed, uint16_t* dense, cudaStream_t stream);

}  // namespace flashjax::gather

#endif  // FLASHJAX_CUDA_GATHER_UNPACK_LAUNCH_H_
