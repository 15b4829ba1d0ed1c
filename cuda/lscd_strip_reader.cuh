// A warp's walk over strips: bitmap and schedule up to one group ahead, values through a ring of
// segments.
//
// Streams run on from strip to strip, and so does the walk: where a strip ends nothing is looked up
// and nothing read twice. Only its first group costs that. (Streams are up to a ring of segments
// apart: wherever a walk begins or ends it reads segments of which its neighbour needs a part.)
//
// `Ring` says how segments are copied (bulk copies on sm_90, cp.async on sm_80). It has kSegments,
// of which kAhead are fetched ahead, `data` (shared memory of kBytes), slot() (the slot that the
// next Wait() is for), Copy(source, any, is_first, lane) (the next slot; any = false past the end
// of the walk; is_first = true for what the walk begins with, which its neighbour ends with) and
// Wait().
#ifndef FLASHJAX_CUDA_LSCD_STRIP_READER_CUH_
#define FLASHJAX_CUDA_LSCD_STRIP_READER_CUH_

#include <cstdint>

#include "cuda/common/ptx.cuh"
#include "cuda/lscd_decode.cuh"

namespace flashjax {

template <typename Ring>
struct StripReader {
  static_assert(Ring::kSegments - Ring::kAhead >= kMaxSpread);
  const PackedWeight& w;
  const int lane;
  Ring ring;
  uint32_t p = 0, q = 0;  // addresses of the next values of the lane's two streams

  __device__ __forceinline__ StripReader(const PackedWeight& w, int lane) : w(w), lane(lane) {}

  // Begins a walk from a group of a strip to before group1 of strip1 (which may be the same).
  // Strips past the last one read as zeros: they only keep their warpgroup company.
  __device__ __forceinline__ void Begin(int strip, int group, int strip1, int group1) {
    strip_ = strip;
    group_ = group;
    bits_ = make_uint4(0, 0, 0, 0);
    schedule_ = 0;
    waits_ = 0;
    p = q = ring.data + lane * 4;
    if (strip_ >= w.strips) return;  // next_ is not before last_ here: nothing is copied
    const StreamStart start = FindStart(w, strip, group, lane);
    last_ = strip1 < w.strips ? FindEnd(w, strip1, group1) : FindEnd(w, w.strips - 1, w.groups);
    next_bits_ = (static_cast<uint32_t>(strip) * w.groups + group) * kLanes + lane;
    bits_ = LoadStreaming(w.bitmap + next_bits_);
    entry_ =
        (static_cast<uint32_t>(strip) * w.entries_per_strip + group / kEntryGroups) * kEntryWords;
    schedule_ahead_ = w.entries[entry_ + 1];
    TakeSchedule();
    p = Wrap(p + (ring.slot() * kSegmentWords + start.p) * kWordBytes);
    q = Wrap(q + (ring.slot() * kSegmentWords + start.q) * kWordBytes + 2);
    waits_ = start.resident - start.first;
    next_ = start.first;
  }

  // Asks for the segments that a walk begins with.
  __device__ __forceinline__ void CopyFirst() {
    __syncwarp();  // every lane has read the last of the previous walk
    const uint32_t resident = next_ + waits_;
#pragma unroll 1
    while (next_ < resident) Copy(true);
  }

  // What is only fetched ahead is asked for behind what all warps begin with. A ring that counts
  // what is under way (cp.async) can wait for the first segment before that if there are more.
  __device__ __forceinline__ void WaitForFirstStep() {
    uint32_t waited = 0;
    if (waits_ > Ring::kAhead) {
      ring.Wait();
      waited = 1;
    }
#pragma unroll
    for (int i = 0; i < Ring::kAhead; ++i) Copy(true);
    for (; waited < waits_; ++waited) ring.Wait();
  }

  // The next group of the walk, if there is any.
  __device__ __forceinline__ void LoadAhead(bool any) {
    bits_ahead_ = make_uint4(0, 0, 0, 0);
    schedule_ahead_ = 0;
    if (++group_ == w.groups) {
      group_ = 0;
      ++strip_;
    }
    if (any && strip_ < w.strips) {
      next_bits_ += kLanes;
      bits_ahead_ = LoadStreaming(w.bitmap + next_bits_);
      if (group_ % kEntryGroups == 0) entry_ += kEntryWords;
      schedule_ahead_ = w.entries[entry_ + 1];
    }
  }

  // Makes the values of a step of the current group resident; returns the lane's bitmap.
  __device__ __forceinline__ uint32_t BeginStep(int step) {
    if ((schedule_ >> step) & 1) {
      __syncwarp();  // every lane has left the slot that is overwritten
      Copy(false);
      ring.Wait();
    }
    p = Wrap(p);
    q = Wrap(q);
    return step == 0 ? bits_.x : step == 1 ? bits_.y : step == 2 ? bits_.z : bits_.w;
  }

  __device__ __forceinline__ void NextGroup() {
    bits_ = bits_ahead_;
    // A chain's streams begin together, in a segment of their own.
    if (group_ == 0 && (schedule_ahead_ & 0xffffu) == 0) {
      p = ring.data + ring.slot() * kSegmentBytes + lane * 4;
      q = p + 2;
    }
    TakeSchedule();
  }

 private:
  // The group's four bits "this step needs one segment more", of what was loaded ahead: not sooner
  // than they are needed, or the warp waits for the load.
  __device__ __forceinline__ void TakeSchedule() {
    schedule_ = schedule_ahead_ >> (16 + kGroupSteps * (group_ % kEntryGroups));
  }
  __device__ __forceinline__ uint32_t Wrap(uint32_t address) const {
    constexpr uint32_t kBytes = Ring::kSegments * kSegmentBytes;
    return address >= ring.data + kBytes ? address - kBytes : address;
  }
  __device__ __forceinline__ void Copy(bool is_first) {
    ring.Copy(w.values + int64_t{next_} * kSegmentBytes, next_ < last_, is_first, lane);
    ++next_;
  }

  uint4 bits_, bits_ahead_;
  uint32_t schedule_ = 0, schedule_ahead_ = 0, waits_ = 0;
  uint32_t next_ = 0, last_ = 0;  // segments to copy: [next_, last_)
  // What is loaded ahead: its strip, its group, the place of its bitmap and the word of its entry.
  int strip_ = 0, group_ = 0;
  uint32_t next_bits_ = 0, entry_ = 0;
};

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_LSCD_STRIP_READER_CUH_
