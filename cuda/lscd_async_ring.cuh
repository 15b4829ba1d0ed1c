// A warp's ring of value segments, filled by cp.async (sm_80); see lscd_strip_reader.cuh.
#ifndef FLASHJAX_CUDA_LSCD_ASYNC_RING_CUH_
#define FLASHJAX_CUDA_LSCD_ASYNC_RING_CUH_

#include <cstdint>

#include "cuda/common/ptx.cuh"
#include "cuda/lscd_decode.cuh"

namespace flashjax {

struct AsyncRing {
  static constexpr int kSegments = kRingSegments, kAhead = kPrefetch;
  static constexpr int kBytes = RingBytes(kSegments);
  uint32_t data = 0;
  uint32_t slot_in = 0, slot_out = 0;  // slots of the next copy and the next wait

  __device__ __forceinline__ uint32_t slot() const { return slot_out; }
  __device__ __forceinline__ void Copy(const uint8_t* source, bool any, bool, int lane) {
    if (any) {
      const uint32_t dst = data + slot_in * kSegmentBytes + lane * 16;
#pragma unroll
      for (int i = 0; i < kSegmentBytes; i += 512) CopyAsync16(dst + i, source + i + lane * 16);
      if (slot_in == 0) {
#pragma unroll
        for (int i = 0; i < kSegmentBytes; i += 512) {
          CopyAsync16(dst + kSegments * kSegmentBytes + i, source + i + lane * 16);
        }
      }
      slot_in = Next(slot_in);
    }
    CopyAsyncCommit();  // also an empty group, so that Wait() can count
  }
  __device__ __forceinline__ void Wait() {
    CopyAsyncWait<kAhead>();
    __syncwarp();  // the other lanes' parts too
    slot_out = Next(slot_out);
  }

 private:
  static __device__ __forceinline__ uint32_t Next(uint32_t slot) {
    return slot == kSegments - 1 ? 0 : slot + 1;
  }
};

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_ASYNC_RING_CUH_
