// A warp's ring of value segments, filled by bulk copies that complete on one mbarrier a slot
// (sm_90); see lscd_strip_reader.cuh.
#ifndef FLASHJAX_CUDA_LSCD_BULK_RING_CUH_
#define FLASHJAX_CUDA_LSCD_BULK_RING_CUH_

#include <cstdint>

#include "cuda/common/ptx.cuh"
#include "cuda/lscd_decode.cuh"

namespace flashjax {

// What is read once L2 may give up first, but for what a walk begins with: its neighbour ends
// there.
template <int kRing, int kRingAhead, bool kReadOnce = true>
struct BulkRing {
  static constexpr int kSegments = kRing, kAhead = kRingAhead, kBytes = RingBytes(kSegments);

  uint32_t data, barriers;
  uint32_t slot_in = 0, slot_out = 0;  // slots of the next copy and the next wait
  uint32_t phase = 0;                  // of slot_out's barrier

  __device__ __forceinline__ uint32_t slot() const { return slot_out; }
  __device__ __forceinline__ void Copy(const uint8_t* source, bool any, bool is_first, int lane) {
    if (!any) return;
    if (lane == 0) {
      const uint32_t barrier = barriers + slot_in * 8, dst = data + slot_in * kSegmentBytes;
      const auto copy = kReadOnce && !is_first ? BulkCopyOnce : BulkCopy;
      BarrierExpect(barrier, slot_in == 0 ? 2 * kSegmentBytes : kSegmentBytes);
      copy(dst, source, kSegmentBytes, barrier);
      if (slot_in == 0) copy(dst + kSegments * kSegmentBytes, source, kSegmentBytes, barrier);
    }
    slot_in = slot_in == kSegments - 1 ? 0 : slot_in + 1;
  }
  __device__ __forceinline__ void Wait() {
    BarrierWait(barriers + slot_out * 8, phase);
    if (++slot_out == kSegments) {
      slot_out = 0;
      phase ^= 1;
    }
  }
};

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_BULK_RING_CUH_
