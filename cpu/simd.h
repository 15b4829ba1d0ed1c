// The instruction sets of the CPU code, chosen at run time, and the small kernels that each of them
// has. The kernels' bodies are in simd_kernels-inc.h, compiled once for each set.
#ifndef FLASHJAX_CPU_SIMD_H_
#define FLASHJAX_CPU_SIMD_H_

#include <cstdint>

namespace flashjax {

enum class Simd { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

const char* SimdName(Simd simd);

// The machine's best set, unless FLASHJAX_CPU_SIMD=portable|avx2|avx512 (read once) asks for less.
Simd ActiveSimd();

// Chooses the set for the calls that follow (tests compare them). False, and nothing changes, when
// the name is unknown or the machine lacks the set.
bool SetSimd(const char* name);

// Streams are numbered q = 4 row + t = 32 stream + lane; a tile is uint16 [64 q][16 positions],
// what a step of a strip holds.
struct LscdKernels {
  // Cuts a 64 (k) x 16 (rows of W) block out of the dense matrix, whose rows are `stride` apart,
  // into `tile`, with 0.0 for -0.0, and sets bit i of masks[q] where position i is not zero.
  void (*load_tile)(const uint16_t* dense, int64_t stride, uint16_t* tile, uint16_t* masks);
  // Marks a chain's explicit zeros in masks [total][64 q] and writes its bitmap, entries (the base
  // counted from the chain's start) and counts. Returns the number of segments.
  int64_t (*plan_chain)(uint16_t* masks, int64_t total, int64_t strip_steps, uint32_t* bitmap,
                        uint32_t* entries, uint32_t* counts);
  // Writes a chain's segments from its bitmap and its tiles [total].
  void (*fill_chain)(const uint16_t* tiles, int64_t total, const uint32_t* bitmap, int64_t segments,
                     uint32_t* values);
};

extern const LscdKernels kPortableKernels;
#if defined(__x86_64__)
extern const LscdKernels kAvx2Kernels;
extern const LscdKernels kAvx512Kernels;
#endif

const LscdKernels& Kernels();

}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_H_
