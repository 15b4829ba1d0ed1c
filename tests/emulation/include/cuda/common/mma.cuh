// cuda/common/mma.cuh for the emulated device.
#ifndef FLASHJAX_CUDA_COMMON_MMA_CUH_
#define FLASHJAX_CUDA_COMMON_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "simt.h"

namespace flashjax {

// What the 65536 patterns of a half-precision type mean; converting one by one is slow.
template <typename T, typename Convert>
const float* FloatTable(Convert convert) {
  static const auto* table = [&] {
    auto* floats = new std::array<float, 1 << 16>;
    for (uint32_t i = 0; i < floats->size(); ++i) (*floats)[i] = convert(static_cast<uint16_t>(i));
    return floats;
  }();
  return table->data();
}
inline const float* Floats(__half) {
  return FloatTable<__half>([](uint16_t bits) { return __half2float({bits}); });
}
inline const float* Floats(__nv_bfloat16) {
  return FloatTable<__nv_bfloat16>([](uint16_t bits) { return __bfloat162float({bits}); });
}

// Brings a warp's fragments A (a[4]) and, if any, B (b[2]) together: [row][k] and [n][k].
struct Fragments {
  float a[16][16], b[8][16];
};

// Register i of A holds row lane / 4 + 8 (i % 2), columns 2 (lane % 4) + 8 (i / 2) and the next;
// register i of B holds column n = lane / 4, rows 2 (lane % 4) + 8 i and the next.
template <typename T>
Fragments ExchangeFragments(const char* what, const uint32_t* a, const uint32_t* b) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b == nullptr ? 0 : b[0], b == nullptr ? 0 : b[1]};
  const uint8_t* all = simt::Exchange(what, mine, sizeof mine);
  const float* floats = Floats(T{});
  Fragments f;
  for (int lane = 0; lane < simt::kWarpSize; ++lane) {
    uint16_t halves[12];
    std::memcpy(halves, all + lane * simt::kLaneBytes, sizeof halves);
    for (int i = 0; i < 12; ++i) {
      const int k = 2 * (lane % 4) + i % 2 + 8 * (i < 8 ? i / 4 : i / 2 % 2);
      float& element = i < 8 ? f.a[lane / 4 + 8 * (i / 2 % 2)][k] : f.b[lane / 4][k];
      element = floats[halves[i]];
    }
  }
  return f;
}

template <typename T>
void Mma(T, float* c, const uint32_t* a, const uint32_t* b) {
  const Fragments f = ExchangeFragments<T>("mma", a, b);
  const int lane = simt::Lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) c[i] += f.a[row][k] * f.b[n][k];
  }
}

inline uint32_t Round2(__half, float low, float high) {
  return __float2half_rn(low).bits | uint32_t{__float2half_rn(high).bits} << 16;
}
inline uint32_t Round2(__nv_bfloat16, float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t{__float2bfloat16_rn(high).bits} << 16;
}

inline uint32_t TransposeMatrix(uint32_t v) {
  const uint8_t* rows = simt::Exchange("movmatrix", &v, sizeof v);
  const int lane = simt::Lane();
  uint32_t halves[2];
  for (int i = 0; i < 2; ++i) {
    // Row 2 (lane % 4) + i, column lane / 4: of the lane that holds it, the lower or upper half.
    const int source = 4 * (2 * (lane % 4) + i) + lane / 4 / 2;
    std::memcpy(&halves[i], rows + source * simt::kLaneBytes, sizeof v);
    halves[i] = halves[i] >> (16 * (lane / 4 % 2)) & 0xffff;
  }
  return halves[0] | halves[1] << 16;
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_MMA_CUH_
