#include <algorithm>

#include "cuda/common/device_value.h"
#include "cuda/common/hopper.h"
#include "cuda/common/launch.h"
#include "cuda/gather_matmul.cuh"
#include "cuda/gather_matmul_launch.h"

namespace flashjax::gather {
namespace {

// Clusters of a CTA for each panel.
Grid Clusters(int panels, int64_t clusters, int warps) {
  Grid grid{panels * clusters, warps * kLanes, kSharedBytes};
  grid.cluster = panels;
  return grid;
}

// How many clusters the device holds at once, having allowed the kernel its shared memory.
template <typename T, int kPanels>
cudaError_t ResidentClusters(int& clusters) {
  static PerDevice values;
  return values.Get(clusters, [](int, int& clusters) {
    const cudaError_t error = cudaFuncSetAttribute(
        GatherKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveClusters(&clusters, GatherKernel<T>,
                                          LaunchConfig(Clusters(kPanels, 1, kMaxWarps)).get());
  });
}

template <typename T>
cudaError_t ResidentClusters(int panels, int& clusters) {
  switch (panels) {
    case 2:
      return ResidentClusters<T, 2>(clusters);
    case 4:
      return ResidentClusters<T, 4>(clusters);
    default:
      return ResidentClusters<T, 8>(clusters);
  }
}

// The number of warps among which the units of so many strips are shared most evenly. Each strip
// needs two of its owner's to be finished.
int Warps(int strips, int panels) {
  const int units = strips * kPanelUnits;
  const int least = std::max<int>(kMinWarps, 2 * static_cast<int>(CeilDiv(strips, panels)));
  int best = kMaxWarps;
  const auto work = [&](int warps) { return CeilDiv(units, warps) * warps; };
  for (int warps = kMaxWarps; warps >= least; --warps) {
    if (work(warps) < work(best)) best = warps;
  }
  return best;
}

template <typename T>
cudaError_t LaunchKernel(GatherProduct& product, cudaStream_t stream) {
  int resident = 0;
  const cudaError_t error = ResidentClusters<T>(product.packed.panels, resident);
  if (error != cudaSuccess) return error;
  if (resident < 1) return cudaErrorInvalidConfiguration;
  const int64_t even = CeilDiv(product.packed.strips, resident);
  product.strips_per_cluster = static_cast<int>(std::min<int64_t>(even, kMaxStrips));
  const int64_t clusters = CeilDiv(product.packed.strips, product.strips_per_cluster);
  const int warps = Warps(product.strips_per_cluster, product.packed.panels);
  return Launch(GatherKernel<T>, Clusters(product.packed.panels, clusters, warps), stream, product);
}

}  // namespace

const char* GatherKernelUnavailable() { return HopperUnavailable(); }

cudaError_t LaunchGatherMatmul(const GatherMatmulArgs& args, cudaStream_t stream) {
  if (args.n == 0 || args.m == 0) return cudaSuccess;
  const GatherShape shape{args.m, args.k};
  if (args.n > kTokens || !shape.fits() || args.k % 8 != 0) return cudaErrorInvalidValue;
  GatherProduct product{};
  product.packed = MakePackedGather(args.packed, shape);
  product.x = static_cast<const uint16_t*>(args.x);
  product.epilogue = MakeEpilogue(args.epilogue, args.m);
  product.n = static_cast<int>(args.n);
  product.m = static_cast<int>(args.m);
  product.k = static_cast<int>(args.k);
  return args.is_bfloat16 ? LaunchKernel<__nv_bfloat16>(product, stream)
                          : LaunchKernel<__half>(product, stream);
}

}  // namespace flashjax::gather
