// A warp's ring of value segments, filled by cp.async (sm_80); see lscd_strip_reader.cuh.
#ifndef FLASHJAX_CUDA_LSCD_ASYNC_RING_CUH_
#define FLASHJAX_CUDA_LSCD_ASYNC_RING_CUH_

#include <cstdint>

#include "cuda/common/ptx.cuh"
#include "cuda/lscd_decode.cuh"

namespace flashjax {

struct AsyncRing {
  uint32_t data = 0;
  uint32_t slot_in = 0;

  // Every piece begins with an empty ring, so that the next wait is for the next copy.
  __device__ __forceinline__ uint32_t slot() const { return slot_in; }
  __device__ __forceinline__ void Copy(const uint8_t* source, bool any, int lane) {
    if (any) {
      const uint32_t dst = data + slot_in * kSegmentBytes + lane * 16;
#pragma unroll
      for (int i = 0; i < kSegmentBytes; i += 512) CopyAsync16(dst + i, source + i + lane * 16);
      if (slot_in == 0) {
#pragma unroll
        for (int i = 0; i < kSegmentBytes; i += 512) {
          CopyAsync16(dst + kRingBytes + i, source + i + lane * 16);
        }
      }
      slot_in = slot_in == kRingSegments - 1 ? 0 : slot_in + 1;
    }
    CopyAsyncCommit();  // also an empty group, so that Wait() can count
  }
  __device__ __forceinline__ void Wait() {
    CopyAsyncWait<kPrefetch>();
    __syncwarp();  // the other lanes' parts too
  }
};

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_ASYNC_RING_CUH_
