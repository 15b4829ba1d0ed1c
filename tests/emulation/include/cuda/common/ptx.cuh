// cuda/common/ptx.cuh for the emulated device.
#ifndef FLASHJAX_CUDA_COMMON_PTX_CUH_
#define FLASHJAX_CUDA_COMMON_PTX_CUH_

#include <cuda.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

namespace flashjax {

inline uint8_t* DynamicShared() { return simt::shared_memory; }
inline uint32_t SharedAddress(const void* p) { return simt::SharedAddressOf(p); }

inline int LaneId() { return simt::Lane(); }

inline float FastExp(float v) { return std::exp(v); }

inline uint32_t LoadSharedU16(uint32_t address) {
  uint16_t v;
  std::memcpy(&v, simt::SharedBytes(address, 2), 2);
  return v;
}

inline uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

inline uint4 LoadShared16(uint32_t address) {
  uint4 v;
  std::memcpy(&v, simt::SharedBytes(address, 16), 16);
  return v;
}

inline void StoreShared16(uint32_t address, uint4 v) {
  std::memcpy(simt::SharedBytes(address, 16), &v, 16);
}

inline uint4 LoadStreaming(const uint4* p) { return *p; }
inline uint2 LoadStreaming(const uint2* p) { return *p; }

inline void StoreRelease(uint64_t* p, uint64_t v) { *p = v; }
inline uint64_t LoadAcquire(const uint64_t* p) { return *p; }

inline void CopyAsync16(uint32_t dst, const void* src) { simt::CopyAsync(dst, src, 16); }
inline void CopyAsyncCommit() { simt::CommitCopies(); }
template <int kPending>
void CopyAsyncWait() {
  simt::WaitForCopies(kPending);
}

template <int kMatrices>
void LoadMatrices(uint32_t* r, uint32_t address) {
  const uint8_t* rows = simt::Exchange("ldmatrix", &address, sizeof address);
  const int lane = simt::Lane();
  for (int i = 0; i < kMatrices; ++i) {
    uint32_t row;
    std::memcpy(&row, rows + (8 * i + lane / 4) * simt::kLaneBytes, 4);
    std::memcpy(&r[i], simt::SharedBytes(row, 16) + lane % 4 * 4, 4);
  }
}
inline void LoadMatrix4(uint32_t r[4], uint32_t address) { LoadMatrices<4>(r, address); }
inline void LoadMatrix2(uint32_t r[2], uint32_t address) { LoadMatrices<2>(r, address); }

inline void StoreMatrix4Transposed(uint32_t address, const uint32_t v[4]) {
  const uint8_t* columns = simt::Exchange("stmatrix", &address, sizeof address);
  const int lane = simt::Lane();
  for (int i = 0; i < 8; ++i) {
    uint32_t column;
    std::memcpy(&column, columns + (i / 2 * 8 + lane % 4 * 2 + i % 2) * simt::kLaneBytes, 4);
    const uint16_t half = static_cast<uint16_t>(v[i / 2] >> (16 * (i % 2)));
    std::memcpy(simt::SharedBytes(column, 16) + lane / 4 * 2, &half, 2);
  }
}

inline void BarrierInit(uint32_t barrier, uint32_t count) { simt::InitBarrier(barrier, count); }
inline void BarrierInitFence() {}
inline void BarrierExpect(uint32_t barrier, uint32_t bytes) {
  simt::ArriveAtBarrier(barrier, bytes);
}
inline void BarrierArrive(uint32_t barrier) { simt::ArriveAtBarrier(barrier, 0); }
inline void BarrierArriveInCluster(uint32_t barrier) {
  simt::AsCta(static_cast<int>(barrier >> 24), [=] { BarrierArrive(barrier & 0xffffffu); });
}
inline void BarrierWait(uint32_t barrier, uint32_t phase) { simt::WaitForBarrier(barrier, phase); }

inline void BulkCopy(uint32_t dst, const void* src, uint32_t bytes, uint32_t barrier) {
  simt::CopyWithBarrier(barrier, dst, bytes,
                        [=] { std::memcpy(simt::SharedBytes(dst, bytes), src, bytes); });
}

inline void BulkCopyOnce(uint32_t dst, const void* src, uint32_t bytes, uint32_t barrier) {
  BulkCopy(dst, src, bytes, barrier);
}

// Rows of 128 bytes: bits 4..6 of an address are exchanged with bits 7..9.
inline uint32_t Swizzle128(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void TensorCopy2d(uint32_t dst, const void* map, int x, int y, uint32_t barrier) {
  const CUtensorMap box = *static_cast<const CUtensorMap*>(map);
  const uint32_t bytes = box.box_columns * box.box_rows * 2;
  simt::CopyWithBarrier(barrier, dst, bytes, [=] {
    for (uint32_t r = 0; r < box.box_rows; ++r) {
      for (uint32_t c = 0; c < box.box_columns; ++c) {
        uint16_t v = 0;
        if (y + r < box.rows && x + c < box.columns) {
          std::memcpy(&v, box.data + (y + r) * box.row_bytes + (x + c) * 2, 2);
        }
        std::memcpy(simt::SharedBytes(Swizzle128(dst + r * 128 + c * 2), 2), &v, 2);
      }
    }
  });
}

inline void TensorCopy2dToCluster(uint32_t dst, const void* map, int x, int y, uint32_t barrier,
                                  uint16_t ctas) {
  for (int rank = 0; rank < 16; ++rank) {
    if (ctas >> rank & 1) simt::AsCta(rank, [=] { TensorCopy2d(dst, map, x, y, barrier); });
  }
}

inline void CopiesSeeShared() {}  // whether it is missing cannot be noticed here

inline void TensorStore2d(const void* map, int x, int y, uint32_t src) {
  const CUtensorMap box = *static_cast<const CUtensorMap*>(map);
  simt::StartStore([=] {
    for (uint32_t r = 0; r < box.box_rows && y + r < box.rows; ++r) {
      for (uint32_t c = 0; c < box.box_columns && x + c < box.columns; ++c) {
        std::memcpy(box.data + (y + r) * box.row_bytes + (x + c) * 2,
                    simt::SharedBytes(Swizzle128(src + r * 128 + c * 2), 2), 2);
      }
    }
  });
}

inline void WaitForStoreReads() { simt::FinishStores(); }

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_PTX_CUH_
