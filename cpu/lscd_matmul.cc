#include "cpu/lscd_matmul.h"

#include <algorithm>
#include <memory>
#include <new>

namespace flashjax {
namespace {

// Items small enough to balance the threads (which others may keep busy) and large enough that
// their start does not matter: a run of strips first spreads the segments in which its streams
// stand.
constexpr int64_t kItemsPerThread = 8;
constexpr int64_t kItemElements = 1 << 17;

// Cuts [0, size) into runs of equal length and does them in parallel. `cost` is that of one.
void ForRuns(int64_t size, int64_t cost, int64_t multiple, const ParallelFor& parallel_for,
             const std::function<void(int64_t first, int64_t count)>& body) {
  int64_t run = std::max(CeilDiv(size, kItemsPerThread * parallel_for.threads),
                         CeilDiv(kItemElements, std::max<int64_t>(cost, 1)));
  run = CeilDiv(run, multiple) * multiple;
  const int64_t items = CeilDiv(size, run);
  const auto item = [&](int64_t i) { body(i * run, std::min(run, size - i * run)); };
  if (items == 1) {
    item(0);
  } else if (items > 1) {
    parallel_for.run(items, item);
  }
}

struct AlignedDelete {
  void operator()(float* data) const { ::operator delete(data, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float, AlignedDelete>;

AlignedFloats NewAligned(int64_t size) {
  return AlignedFloats(
      static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t{64})));
}

// Runs of strips that add to sums of their own. Their number does not depend on the threads, so
// that results do not either; more would take more memory.
constexpr int64_t kMaxBlocks = 8, kMinBlockStrips = 32;

}  // namespace

void LscdMatmul(const LscdMatrix& w, const void* x, FloatType x_type, int64_t n, const float* bias,
                void* y, FloatType y_type, const ParallelFor& parallel_for) {
  if (n == 0 || w.shape.m == 0) return;
  const LscdKernels& kernels = Kernels();
  const int64_t columns = w.shape.steps() * kStepK;
  const AlignedFloats permuted = NewAligned(n * columns);
  const MatmulJob job{w, n, x_type, y_type, x, bias, permuted.get(), y};
  ForRuns(w.shape.steps(), n * kStepK, 1, parallel_for,
          [&](int64_t first, int64_t count) { kernels.permute_x(job, first, count); });
  // Decoding an element costs about as much as two products with it.
  ForRuns(w.shape.strips(), (n + 2) * kStripRows * columns, 1, parallel_for,
          [&](int64_t first, int64_t count) { kernels.matmul_strips(job, first, count); });
}

void LscdMatmulTransposed(const LscdMatrix& w, const void* dy, FloatType dy_type, int64_t n,
                          void* dx, FloatType dx_type, const ParallelFor& parallel_for) {
  const LscdShape& shape = w.shape;
  if (n == 0 || shape.k == 0 || shape.m == 0) return;
  const LscdKernels& kernels = Kernels();
  const int64_t run = std::max(kMinBlockStrips, CeilDiv(shape.strips(), kMaxBlocks));
  const int64_t blocks = CeilDiv(shape.strips(), run), size = n * shape.steps() * kStepK;
  const AlignedFloats sums = NewAligned(blocks * size);
  const TransposedJob job{w, n, blocks, dy_type, dx_type, dy, sums.get(), dx};
  parallel_for.run(blocks * shape.entries(), [&](int64_t item) {
    const int64_t entry = item % shape.entries(), block = item / shape.entries();
    const int64_t first = block * run;
    kernels.add_strips(job, entry, first, std::min(run, shape.strips() - first),
                       sums.get() + block * size);
  });
  ForRuns(shape.steps(), n * kStepK * blocks, 1, parallel_for,
          [&](int64_t first, int64_t count) { kernels.store_sums(job, first, count); });
}

void LscdUnpack(const LscdMatrix& w, bool to_float, void* dense, const ParallelFor& parallel_for) {
  if (w.shape.k == 0) return;
  const LscdKernels& kernels = Kernels();
  ForRuns(w.shape.strips(), w.shape.k * kStripRows, kUnpackStrips, parallel_for,
          [&](int64_t first, int64_t count) {
            kernels.unpack_strips(w, first, count, to_float, dense);
          });
}

}  // namespace flashjax
