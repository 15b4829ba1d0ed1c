#include "cuda/common/launch.h"
#include "cuda/gather_unpack.cuh"
#include "cuda/gather_unpack_launch.h"

namespace flashjax::gather {
namespace {

template <typename Order>
cudaError_t LaunchOrder(const PackedGather& packed, const GatherShape& shape,
                        const DenseOutput& out, cudaStream_t stream) {
  constexpr int kSharedBytes = Order::kLines * Order::kStride * 2;
  const cudaError_t error = cudaFuncSetAttribute(
      UnpackKernel<Order>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  Grid grid{CeilDiv(shape.strips(), Order::kStrips), kUnpackThreads, kSharedBytes};
  grid.blocks_y = CeilDiv(shape.k, Order::kColumns);
  return Launch(UnpackKernel<Order>, grid, stream, packed, out, static_cast<uint32_t>(shape.m));
}

}  // namespace

cudaError_t LaunchGatherUnpack(const GatherPackedArgs& packed, int64_t m, int64_t k,
                               bool transposed, uint16_t* dense, cudaStream_t stream) {
  if (m == 0 || k == 0) return cudaSuccess;
  const GatherShape shape{m, k};
  if (!shape.fits()) return cudaErrorInvalidValue;
  const DenseOutput out = MakeDenseOutput(dense, transposed ? k : m, transposed ? m : k);
  const PackedGather w = MakePackedGather(packed, shape);
  return transposed ? LaunchOrder<ColumnMajor>(w, shape, out, stream)
                    : LaunchOrder<RowMajor>(w, shape, out, stream);
}

}  // namespace flashjax::gather
