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

// What a lane multiplies, of a warp's fragments A and, if any, B: rows lane / 4 and lane / 4 + 8
// of A, columns 2 (lane % 4) and the next of B.
struct Fragments {
  float a[2][16], b[2][16];
};

// Brings a warp's a[4] and, if any, b[2] together. Register i of A holds row lane / 4 + 8 (i % 2),
// columns 2 (lane % 4) + 8 (i / 2) and the next; register i of B holds column n = lane / 4, rows
// 2 (lane % 4) + 8 i and the next.
template <typename T>
Fragments ExchangeFragments(const char* what, const uint32_t* a, const uint32_t* b) {
  const float* floats = Floats(T{});
  float mine[12] = {};
  for (int i = 0; i < (b == nullptr ? 8 : 12); ++i) {
    const uint32_t word = i < 8 ? a[i / 2] : b[i / 2 - 4];
    mine[i] = floats[i % 2 == 0 ? word & 0xffff : word >> 16];
  }
  const uint8_t* all = simt::Exchange(what, mine, sizeof mine);
  const auto copy_two = [all](float* to, int lane, int i) {
    std::memcpy(to, all + lane * simt::kLaneBytes + i * sizeof *to, 2 * sizeof *to);
  };
  const int lane = simt::Lane();
  Fragments f;
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; k += 2) {
      const int source = k % 8 / 2, half = k / 8;
      copy_two(&f.a[i][k], lane / 4 * 4 + source, 2 * (i + 2 * half));
      if (b != nullptr) copy_two(&f.b[i][k], (lane % 4 * 2 + i) * 4 + source, 8 + 2 * half);
    }
  }
  return f;
}

template <typename T>
void Mma(T, float* c, const uint32_t* a, const uint32_t* b) {
  const Fragments f = ExchangeFragments<T>("mma", a, b);
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) c[i] += f.a[i / 2][k] * f.b[i % 2][k];
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
