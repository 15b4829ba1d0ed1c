#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "cpu/lscd_layout.h"
#include "cuda/lscd_matmul_launch.h"
#include "cuda/lscd_mma.cuh"
#include "cuda/lscd_wgmma.cuh"

namespace flashjax {
namespace {

// More ranks than any GPU of today has multiprocessors (the mma kernel's slots are a quarter).
constexpr int64_t kWorkspaceSlots = 160;

constexpr int64_t SlotBytes(int warps, int64_t tile_n) {
  return warps * (sizeof(uint32_t) + tile_n / 8 * kLanes * sizeof(float4));
}

int64_t TileN(int64_t n, int64_t widest) {
  int64_t tile = 8;
  while (tile < n && tile < widest) tile *= 2;
  return tile;
}

int DeviceAttribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}

const char* WgmmaUnavailable(const LscdMatmulArgs& args) {
  if (DeviceAttribute(cudaDevAttrComputeCapabilityMajor) != 9) return "a Hopper GPU (sm_90a)";
  if (args.k % 8 != 0) return "a number of input features that is a multiple of 8";
  if (reinterpret_cast<uintptr_t>(args.x) % 16 != 0) return "x aligned to 16 bytes";
  return nullptr;
}

// Everything that the kernels of one call share.
struct Problem {
  const LscdMatmulArgs& args;
  PackedWeight w;
  cudaStream_t stream;

  const uint8_t* x(int64_t n0) const {
    return static_cast<const uint8_t*>(args.x) + n0 * args.k * 2;
  }
  Output output(int64_t n0, int64_t n) const {
    const int64_t size = args.is_float_output ? 4 : 2;
    Output out{};
    out.y = static_cast<uint8_t*>(args.y) + n0 * args.m * size;
    out.bias = args.bias;
    out.n = static_cast<int>(n);
    out.is_float = args.is_float_output;
    return out;
  }
};

// A memset behind which the product can be launched at once. It is itself an ordinary launch: all
// that came before is complete and visible when it starts, and so when the product starts.
__global__ void ClearFlagsKernel(uint32_t* flags, int count) {
#if __CUDA_ARCH__ >= 900
  LaunchDependents();
#endif
  for (int i = threadIdx.x; i < count; i += blockDim.x) flags[i] = 0;
}

template <typename... Parameters, typename... Arguments>
cudaError_t LaunchDependent(void (*kernel)(Parameters...), int grid, int threads, int shared_bytes,
                            cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Sizes the grid, clears the flags that it uses and launches.
template <typename Config, int kTileN, typename Kernel, typename X>
cudaError_t LaunchStreamK(Kernel kernel, const X& x, const Problem& problem, Output out) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  int resident = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, Config::kThreads,
                                                        Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t slot = SlotBytes(Config::kWarps, kTileN);
  const int64_t slots = static_cast<int64_t>(problem.args.workspace_bytes) / slot;
  const int64_t units = CeilDiv(problem.args.m, Config::kTileM) * problem.w.groups;
  const int64_t grid =
      std::min({units, slots, int64_t{resident} * DeviceAttribute(cudaDevAttrMultiProcessorCount)});
  if (grid < 1 || units * grid > INT32_MAX) return cudaErrorInvalidValue;
  // Flags and partial sums lie in one block each, so that one memset clears all flags.
  out.partials = static_cast<float4*>(problem.args.workspace);
  const int64_t partial_bytes = slot - Config::kWarps * int64_t{sizeof(uint32_t)};
  out.flags = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(problem.args.workspace) +
                                          grid * partial_bytes);
  const int blocks = static_cast<int>(grid), flags = blocks * Config::kWarps;
  if constexpr (Config::kDependentLaunch) {
    ClearFlagsKernel<<<1, 512, 0, problem.stream>>>(out.flags, flags);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    return LaunchDependent(kernel, blocks, Config::kThreads, Config::kSharedBytes, problem.stream,
                           x, problem.w, out);
  }
  error = cudaMemsetAsync(out.flags, 0, flags * sizeof(uint32_t), problem.stream);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, Config::kThreads, Config::kSharedBytes, problem.stream>>>(x, problem.w, out);
  return cudaGetLastError();
}

template <typename T, int kTileN>
cudaError_t LaunchMma(const Problem& problem, int64_t n0, int64_t n) {
  DenseInput x{};
  x.x = reinterpret_cast<const uint16_t*>(problem.x(n0));
  x.n = static_cast<int>(n);
  x.k = static_cast<int>(problem.args.k);
  x.aligned = x.k % 8 == 0 && reinterpret_cast<uintptr_t>(x.x) % 16 == 0;
  return LaunchStreamK<MmaConfig<kTileN>, kTileN>(LscdMmaKernel<T, kTileN>, x, problem,
                                                  problem.output(n0, n));
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Through the runtime, so that the module loads where there is no driver.
EncodeTiled FindEncodeTiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled>(function);
}

template <typename T, int kTileN>
cudaError_t LaunchWgmma(const Problem& problem, int64_t n0, int64_t n) {
  static const EncodeTiled encode = FindEncodeTiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(problem.args.k), static_cast<cuuint64_t>(n)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(problem.args.k) * 2};
  const cuuint32_t box[2] = {kStepK, kTileN}, ones[2] = {1, 1};
  CUtensorMap x;
  const CUresult result =
      encode(&x,
             std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             2, const_cast<uint8_t*>(problem.x(n0)), size, stride, box, ones,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  return LaunchStreamK<WgmmaConfig<kTileN>, kTileN>(LscdWgmmaKernel<T, kTileN>, x, problem,
                                                    problem.output(n0, n));
}

template <typename T>
cudaError_t LaunchTile(LscdKernel kernel, const Problem& problem, int64_t n0, int64_t n) {
  if (kernel == LscdKernel::kMma) {
    switch (TileN(n, 32)) {
      case 8:
        return LaunchMma<T, 8>(problem, n0, n);
      case 16:
        return LaunchMma<T, 16>(problem, n0, n);
      default:
        return LaunchMma<T, 32>(problem, n0, n);
    }
  }
  switch (TileN(n, 128)) {
    case 8:
      return LaunchWgmma<T, 8>(problem, n0, n);
    case 16:
      return LaunchWgmma<T, 16>(problem, n0, n);
    case 32:
      return LaunchWgmma<T, 32>(problem, n0, n);
    case 64:
      return LaunchWgmma<T, 64>(problem, n0, n);
    default:
      return LaunchWgmma<T, 128>(problem, n0, n);
  }
}

}  // namespace

size_t LscdWorkspaceBytes(int64_t n, int64_t m, int64_t k) {
  const int64_t units = CeilDiv(m, 16 * kStripRows) * LscdShape{m, k}.groups();
  return static_cast<size_t>(std::clamp<int64_t>(units, 1, kWorkspaceSlots) *
                             SlotBytes(16, TileN(n, 128)));
}

const char* LscdKernelUnavailable(const LscdMatmulArgs& args) {
  return args.kernel == LscdKernel::kWgmma ? WgmmaUnavailable(args) : nullptr;
}

cudaError_t LaunchLscdMatmul(const LscdMatmulArgs& args, cudaStream_t stream) {
  if (args.n == 0 || args.m == 0) return cudaSuccess;
  const PackedWeight w = MakePackedWeight(args.bitmap, args.entries, args.values, args.m, args.k);
  LscdKernel kernel = args.kernel;
  if (kernel == LscdKernel::kAuto) {
    kernel = WgmmaUnavailable(args) == nullptr ? LscdKernel::kWgmma : LscdKernel::kMma;
  }
  const Problem problem{args, w, stream};
  const int64_t widest = kernel == LscdKernel::kMma ? 32 : 128;
  for (int64_t n0 = 0; n0 < args.n; n0 += widest) {
    const int64_t n = std::min(widest, args.n - n0);
    const cudaError_t error = args.is_bfloat16 ? LaunchTile<__nv_bfloat16>(kernel, problem, n0, n)
                                               : LaunchTile<__half>(kernel, problem, n0, n);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace flashjax
