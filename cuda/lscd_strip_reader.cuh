// A warp's walk over a strip: bitmap and schedule one group ahead, values through a ring of
// segments.
//
// `Ring` says how segments are copied (bulk copies on sm_90, cp.async on sm_80). It has `data` (the
// shared memory of kRingStride bytes), slot() (the slot that the next Wait() is for), Copy(source,
// any, lane) (the next slot; any = false past the end of the piece) and Wait().
#ifndef FLASHJAX_CUDA_LSCD_STRIP_READER_CUH_
#define FLASHJAX_CUDA_LSCD_STRIP_READER_CUH_

#include <cstdint>

#include "cuda/common/ptx.cuh"
#include "cuda/lscd_decode.cuh"

namespace flashjax {

template <typename Ring>
struct StripReader {
  const PackedWeight& w;
  const int lane;
  Ring ring;
  int strip = 0;
  uint32_t p = 0, q = 0;  // addresses of the next values of the lane's two streams

  __device__ __forceinline__ StripReader(const PackedWeight& w, int lane) : w(w), lane(lane) {}

  // Looks up where the streams of the next piece stand: loads that take a round trip to memory, so
  // do it while something else is under way.
  __device__ __forceinline__ void Look(int strip, int group0, int group1) {
    if (strip < w.strips) ahead_ = FindRange(w, strip, group0, group1, lane);
  }

  // Begins the piece that was looked up: asks for the first segments. Strips past the last one
  // read as zeros: they only keep their warpgroup company.
  __device__ __forceinline__ void Begin(int new_strip, int group0) {
    strip = new_strip;
    bits_ = make_uint4(0, 0, 0, 0);
    schedule_ = 0;
    waits_ = 0;
    p = q = ring.data + lane * 4;
    if (!live()) return;
    group_ = group0;
    next_bits_ = w.bitmap + (int64_t{strip} * w.groups + group0) * kLanes + lane;
    bits_ = LoadStreaming(next_bits_);
    entry_ =
        (static_cast<uint32_t>(strip) * w.entries_per_strip + group0 / kEntryGroups) * kEntryWords;
    schedule_ahead_ = w.entries[entry_ + 1];
    TakeSchedule();
    p = Wrap(ring.data + (ring.slot() * kSegmentWords + ahead_.p) * kWordBytes + lane * 4);
    q = Wrap(ring.data + (ring.slot() * kSegmentWords + ahead_.q) * kWordBytes + lane * 4 + 2);
    waits_ = ahead_.resident - ahead_.first;
    next_ = ahead_.first;
    last_ = ahead_.last;
    __syncwarp();  // every lane has read the last of the previous piece
#pragma unroll 1
    while (next_ < ahead_.resident + kPrefetch) Copy();
  }

  __device__ __forceinline__ void WaitForFirstStep() {
    for (uint32_t i = 0; i < waits_; ++i) ring.Wait();
  }

  __device__ __forceinline__ void LoadAhead(bool any) {
    bits_ahead_ = make_uint4(0, 0, 0, 0);
    schedule_ahead_ = 0;
    if (any && live()) {
      next_bits_ += kLanes;
      bits_ahead_ = LoadStreaming(next_bits_);
      if (++group_ % kEntryGroups == 0) entry_ += kEntryWords;
      schedule_ahead_ = w.entries[entry_ + 1];
    }
  }

  // Makes the values of a step of the current group resident; returns the lane's bitmap.
  __device__ __forceinline__ uint32_t BeginStep(int step) {
    if ((schedule_ >> step) & 1) {
      __syncwarp();  // every lane has left the slot that is overwritten
      Copy();
      ring.Wait();
    }
    p = Wrap(p);
    q = Wrap(q);
    return step == 0 ? bits_.x : step == 1 ? bits_.y : step == 2 ? bits_.z : bits_.w;
  }

  __device__ __forceinline__ void NextGroup() {
    bits_ = bits_ahead_;
    TakeSchedule();
  }

  __device__ __forceinline__ bool live() const { return strip < w.strips; }

 private:
  // The group's four bits "this step needs one segment more", of what was loaded ahead: not sooner
  // than they are needed, or the warp waits for the load.
  __device__ __forceinline__ void TakeSchedule() {
    schedule_ = schedule_ahead_ >> (16 + kGroupSteps * (group_ % kEntryGroups));
  }
  __device__ __forceinline__ uint32_t Wrap(uint32_t address) const {
    return address >= ring.data + kRingBytes ? address - kRingBytes : address;
  }
  __device__ __forceinline__ void Copy() {
    ring.Copy(w.values + int64_t{next_} * kSegmentBytes, next_ < last_, lane);
    ++next_;
  }

  uint4 bits_, bits_ahead_;
  const uint4* next_bits_ = nullptr;
  uint32_t schedule_ = 0, schedule_ahead_ = 0, waits_ = 0;
  uint32_t next_ = 0, last_ = 0;  // segments to copy: [next_, last_)
  SegmentRange ahead_ = {};
  int group_ = 0;
  uint32_t entry_ = 0;  // word of the entry of the group that is loaded ahead
};

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_STRIP_READER_CUH_
