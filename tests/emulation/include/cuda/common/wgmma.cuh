// cuda/common/wgmma.cuh for the emulated device. The warps of a warpgroup need not meet: each has
// rows of its own.
#ifndef FLASHJAX_CUDA_COMMON_WGMMA_CUH_
#define FLASHJAX_CUDA_COMMON_WGMMA_CUH_

#include <cstdint>

#include "cuda/common/mma.cuh"
#include "cuda/common/ptx.cuh"

namespace flashjax {

template <typename T, int N>
struct Tile {};

inline void WgmmaFence() {}
inline void WgmmaCommit() { simt::CommitProducts(); }
template <int kPending>
void WgmmaWait() {
  simt::WaitForProducts(kPending);
  simt::Exchange("wgmma.wait_group", nullptr, 0);  // the products of all lanes are done
}
template <int kRegisters>
void ClaimRegisters() {}
template <int kRegisters>
void ReleaseRegisters() {}

inline uint32_t WgmmaDescriptorLow(uint32_t address) {
  return ((address & 0x3ffffu) >> 4) | 0x10000u;
}
inline uint64_t WgmmaDescriptor(uint32_t low) { return (uint64_t{0x40000040u} << 32) | low; }

template <typename T, int N>
void Wgmma(Tile<T, N>, float* d, const uint32_t* a, uint64_t b) {
  simt::StartProduct([=] {
    const Fragments f = ExchangeFragments<T>("wgmma", a, nullptr);
    const float* floats = Floats(T{});
    const uint32_t tile = static_cast<uint32_t>(b & 0x3fff) << 4;
    const int lane = simt::Lane();
    for (int j = 0; j < N / 4; ++j) {
      const int n = j / 2 * 8 + lane % 4 * 2 + j % 2;
      for (int k = 0; k < 16; ++k) {
        const float x =
            floats[LoadSharedU16(Swizzle128(tile + n / 8 * 1024 + n % 8 * 128 + k * 2))];
        d[j / 2 * 4 + j % 2] += f.a[0][k] * x;
        d[j / 2 * 4 + j % 2 + 2] += f.a[1][k] * x;
      }
    }
  });
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_WGMMA_CUH_
