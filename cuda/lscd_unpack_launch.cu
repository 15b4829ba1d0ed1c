#include "cuda/common/launch.h"
#include "cuda/lscd_pack_launch.h"
#include "cuda/lscd_unpack.cuh"

namespace flashjax {
namespace {

template <typename Order, typename Weight>
cudaError_t LaunchUnpack(const Weight& w, const LscdShape& shape, const DenseOutput& out,
                         cudaStream_t stream) {
  constexpr int kSharedBytes = kUnpackWarps * (AsyncRing::kBytes + 2 * Order::kTileSize * 2);
  const cudaError_t error = cudaFuncSetAttribute(
      UnpackKernel<Order, Weight>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  Grid grid{CeilDiv(shape.strips(), kUnpackWarps), kUnpackWarps * kLanes, kSharedBytes};
  grid.blocks_y = CeilDiv(shape.groups(), kPieceGroups);
  return Launch(UnpackKernel<Order, Weight>, grid, stream, w, out);
}

template <typename Weight>
cudaError_t LaunchOrder(const Weight& w, const LscdShape& shape, bool transposed, uint16_t* dense,
                        cudaStream_t stream) {
  const DenseOutput out =
      MakeDenseOutput(dense, transposed ? shape.k : shape.m, transposed ? shape.m : shape.k);
  return transposed ? LaunchUnpack<ColumnMajor>(w, shape, out, stream)
                    : LaunchUnpack<RowMajor>(w, shape, out, stream);
}

}  // namespace

cudaError_t LaunchLscdUnpack(const LscdPackedArgs& packed, int64_t m, int64_t k, bool transposed,
                             uint16_t* dense, cudaStream_t stream) {
  if (m == 0 || k == 0) return cudaSuccess;
  const LscdShape shape{m, k};
  return packed.layer == nullptr
             ? LaunchOrder(MakePackedWeight(packed, m, k), shape, transposed, dense, stream)
             : LaunchOrder(MakePackedStack(packed, m, k), shape, transposed, dense, stream);
}

}  // namespace flashjax
