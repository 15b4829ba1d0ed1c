// Launching the packer and the unpacker of the layout in cpu/lscd_layout.h.
#ifndef FLASHJAX_CUDA_LSCD_PACK_LAUNCH_H_
#define FLASHJAX_CUDA_LSCD_PACK_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/lscd_packed_args.h"

namespace flashjax {

// dense is (k, m), row-major, 16-bit patterns; both packers give the CPU packer's bytes.
// Segments of every chain, uint32 (chains,).
cudaError_t LaunchLscdPackSizes(const uint16_t* dense, int64_t m, int64_t k,
                                uint32_t* chain_segments, cudaStream_t stream);

// `segments` is the sum of chain_segments: the size of `values`.
cudaError_t LaunchLscdPack(const uint16_t* dense, int64_t m, int64_t k,
                           const uint32_t* chain_segments, int64_t segments, uint32_t* bitmap,
                           uint32_t* entries, uint32_t* values, uint32_t* counts,
                           cudaStream_t stream);

// dense is W, (m, k), or its transpose, (k, m).
cudaError_t LaunchLscdUnpack(const LscdPackedArgs& packed, int64_t m, int64_t k, bool transposed,
                             uint16_t* dense, cudaStream_t stream);

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_PACK_LAUNCH_H_
