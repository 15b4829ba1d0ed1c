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

}  // namespace

void LscdMatmul(const LscdMatrix& w, const void* x, FloatType x_type, int64_t n, const float* bias,
                void* y, FloatType y_type, const ParallelFor& parallel_for) {
  if (n == 0 || w.shape.m == 0) return;
  const LscdKernels& kernels = Kernels();
  const int64_t columns = w.shape.steps() * kStepK;
  const std::unique_ptr<float, AlignedDelete> permuted(
      static_cast<float*>(::operator new(n * columns * sizeof(float), std::align_val_t{64})));
  const MatmulJob job{w, n, x_type, y_type, x, bias, permuted.get(), y};
  ForRuns(w.shape.steps(), n * kStepK, 1, parallel_for,
          [&](int64_t first, int64_t count) { kernels.permute_x(job, first, count); });
  // Decoding an element costs about as much as two products with it.
  ForRuns(w.shape.strips(), (n + 2) * kStripRows * columns, 1, parallel_for,
          [&](int64_t first, int64_t count) { kernels.matmul_strips(job, first, count); });
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
