// The instruction sets of the CPU code, chosen at run time, and the small kernels that each of them
// has. The kernels' bodies are in simd_kernels-inc.h, compiled once for each set.
#ifndef FLASHJAX_CPU_SIMD_H_
#define FLASHJAX_CPU_SIMD_H_

#include <cstdint>
#include <functional>

#include "cpu/lscd_layout.h"

namespace flashjax {

enum class Simd { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

const char* SimdName(Simd simd);

// The machine's best set, unless FLASHJAX_CPU_SIMD=portable|avx2|avx512 (read once) asks for less.
Simd ActiveSimd();

// The value of FLASHJAX_CPU_SIMD if it is none of these, else null.
const char* UnknownSimdVariable();

// Chooses the set for the calls that follow (tests compare them). False, and nothing changes, when
// the name is unknown or the machine lacks the set.
bool SetSimd(const char* name);

enum class HalfType { kFloat16, kBfloat16 };
enum class FloatType { kFloat16, kBfloat16, kFloat32 };

// A packed matrix.
struct LscdMatrix {
  LscdShape shape;
  HalfType type;
  const uint32_t* bitmap;
  const uint32_t* entries;
  const uint32_t* values;
  int64_t segments;
};

// x and y of a product. Rows of x are multiplied in tiles of kTileN; the last one may have fewer.
// `permuted` is x as float, in the order in which the streams have their positions and with zeros
// beyond K: [tiles][steps][4 t][rows of the tile][16 positions].
inline constexpr int kTileN = 8;

struct MatmulJob {
  LscdMatrix w;
  int64_t n;
  FloatType x_type, y_type;
  const void* x;      // (n, K)
  const float* bias;  // (M,) or null
  float* permuted;
  void* y;  // (n, M)

  // Where the tile that starts with row n0 of x stands in `permuted`.
  int64_t TileOffset(int64_t n0) const { return n0 * w.shape.steps() * kStepK; }
};

// dx and dy of a product with the transposed weights. The sums of `blocks` runs of strips are kept
// apart, each laid out as MatmulJob's permuted x is.
struct TransposedJob {
  LscdMatrix w;
  int64_t n, blocks;
  FloatType dy_type, dx_type;
  const void* dy;  // (n, M)
  float* sums;
  void* dx;  // (n, K)

  int64_t TileOffset(int64_t n0) const { return n0 * w.shape.steps() * kStepK; }
};

// Strips that are unpacked side by side, so that long pieces of the dense matrix's rows are
// written.
inline constexpr int kUnpackStrips = 8;

// Gives the tiles of the steps that follow in a chain, and how many: whole groups of them.
using TileSource = std::function<int64_t(const uint16_t** tiles)>;

// Streams are numbered q = 4 row + t = 32 stream + lane; a tile is uint16 [64 q][16 positions],
// what a step of a strip holds.
struct LscdKernels {
  // Cuts a 64 (k) x 16 (rows of W) block out of the dense matrix, whose rows are `stride` apart,
  // into `tile`, with 0.0 for -0.0, and sets bit i of masks[q] where position i is not zero.
  void (*load_tile)(const uint16_t* dense, int64_t stride, uint16_t* tile, uint16_t* masks);
  // Marks a chain's explicit zeros in masks [total][64 q] and writes its bitmap, entries (the base
  // counted from the chain's start) and counts. Returns the number of segments.
  int64_t (*plan_chain)(uint16_t* masks, int64_t total, int64_t strip_steps, int spread,
                        uint32_t* bitmap, uint32_t* entries, uint32_t* counts);
  // Writes a chain's segments from its bitmap and its tiles, of `total` steps.
  void (*fill_chain)(const TileSource& next, int64_t total, const uint32_t* bitmap,
                     int64_t segments, uint32_t* values);
  // Writes the columns of some strips of the dense (K, M), as the bits or as floats.
  void (*unpack_strips)(const LscdMatrix& w, int64_t first, int64_t strips, bool to_float,
                        void* dense);
  // Writes some steps of `permuted`.
  void (*permute_x)(const MatmulJob& job, int64_t first, int64_t steps);
  // Writes the columns of some strips of y.
  void (*matmul_strips)(const MatmulJob& job, int64_t first, int64_t strips);
  // Writes the sums of some strips for the k of one entry (16 steps).
  void (*add_strips)(const TransposedJob& job, int64_t entry, int64_t first, int64_t strips,
                     float* sums);
  // Adds up the blocks and writes some steps (64 k each) of dx.
  void (*store_sums)(const TransposedJob& job, int64_t first, int64_t steps);
};

extern const LscdKernels kPortableKernels;
#if defined(__x86_64__)
extern const LscdKernels kAvx2Kernels;
extern const LscdKernels kAvx512Kernels;
#endif

const LscdKernels& Kernels();

}  // namespace flashjax

#endif  // FLASHJAX_CPU_SIMD_H_
