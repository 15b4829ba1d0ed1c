#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <random>
#include <type_traits>

#include "cpu/lscd_layout.h"
#include "cuda/common/device_value.h"
#include "cuda/common/hopper.h"
#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/lscd_column_tiles.h"
#include "cuda/lscd_matmul_launch.h"
#include "cuda/lscd_mma.cuh"
#include "cuda/lscd_wgmma.cuh"

namespace flashjax {
namespace {

// More than any Hopper has multiprocessors, whose ranks have slots (the mma kernel's are a
// quarter).
constexpr int64_t kWorkspaceSlots = 160;

constexpr int64_t SlotBytes(int strips, int64_t tile_n) {
  return strips * (sizeof(uint64_t) + tile_n / 8 * kLanes * sizeof(float4));
}

const char* WgmmaUnavailable(const LscdMatmulArgs& args) {
  if (const char* missing = HopperUnavailable()) return missing;
  if (args.k % 8 != 0) return "a number of input features that is a multiple of 8";
  if (reinterpret_cast<uintptr_t>(args.x) % 16 != 0) return "x aligned to 16 bytes";
  return nullptr;
}

// Everything that the kernels of one call share; Weight is PackedWeight or PackedStack.
template <typename Weight>
struct Problem {
  const LscdMatmulArgs& args;
  Weight w;
  cudaStream_t stream;

  const uint8_t* x(int64_t n0) const {
    return static_cast<const uint8_t*>(args.x) + n0 * args.k * 2;
  }
  Output output(int64_t n0, int64_t n) const {
    Output out{};
    out.epilogue = MakeEpilogue(args.epilogue, args.m);
    const int64_t size = out.epilogue.is_float ? 4 : 2;
    out.epilogue.y = static_cast<uint8_t*>(args.epilogue.y) + n0 * args.m * size;
    out.n = static_cast<int>(n);
    return out;
  }
};

// Of every launch another one, and never 0: splitmix64 of a counter with a random start.
uint64_t NextTicket() {
  static std::atomic<uint64_t> counter{(uint64_t{std::random_device{}()} << 32) |
                                       std::random_device{}()};
  uint64_t z = counter.fetch_add(0x9e3779b97f4a7c15u, std::memory_order_relaxed);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return z != 0 ? z : 1;
}

// For tools that report every read of memory that was not written first.
bool MustClearFlags() {
  static const bool must = std::getenv("FLASHJAX_CLEAR_WORKSPACE") != nullptr;
  return must;
}

// How many blocks of a kernel the device holds at once, having allowed it its shared memory.
template <auto kKernel, typename Config>
cudaError_t ResidentBlocks(int& blocks) {
  static PerDevice values;
  return values.Get(blocks, [](int, int& blocks) {
    cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             Config::kSharedBytes);
    if (error != cudaSuccess) return error;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, Config::kThreads,
                                                          Config::kSharedBytes);
    blocks *= DeviceAttribute<cudaDevAttrMultiProcessorCount>();
    return error;
  });
}

// Among how many ranks the tiles are divided; the device holds `most`.
//
// Where tiles are few, a rank takes several groups of one. With fewer it would end sooner by the
// time of these, but the tile's owner would have more parts to add up: a root of the groups is
// best, and what it is of was measured with tiles of 12 to 32 groups. Elsewhere a few ranks are
// left out if every one then has an equal part of a single tile.
template <int kTileN>
int64_t Ranks(int64_t tiles, int64_t groups, int64_t most) {
  if (most < 1) return 0;
  constexpr int64_t kPerPart = kTileN <= 32 ? 16 : kTileN <= 64 ? 8 : 2;
  const int64_t units = tiles * groups;
  int64_t least = 1;
  while (least * least * kPerPart < groups) ++least;
  const int64_t few = CeilDiv(units, least);
  if (few <= most) return few;
  const int64_t each = CeilDiv(units, most);
  return groups % each == 0 && units / each * 16 >= most * 15 ? units / each : most;
}

// How many tiles of columns at most are a band: as many as leave their x in L2, but W is read anew
// for every band.
int64_t BandTiles(int64_t k, int64_t tile_n) {
  constexpr int64_t kBytesOfX = 32 << 20, kLeast = 6;
  return std::max(kBytesOfX / std::max<int64_t>(2 * k * tile_n, 1), kLeast);
}

// Sizes the grid and launches.
template <auto kKernel, typename Config, int kTileN, typename X, typename Weight>
cudaError_t LaunchStreamK(const X& x, const Problem<Weight>& problem, Output out) {
  int resident = 0;
  cudaError_t error = ResidentBlocks<kKernel, Config>(resident);
  if (error != cudaSuccess) return error;
  const int64_t slot = SlotBytes(Config::kStrips, Config::kColumns);
  const int64_t slots = static_cast<int64_t>(problem.args.workspace_bytes) / slot;
  const int64_t row_tiles = CeilDiv(problem.args.m, Config::kTileM);
  const int64_t column_tiles = CeilDiv(out.n, kTileN);
  const int64_t groups = LscdShape{problem.args.m, problem.args.k}.groups();
  const int64_t most_work =
      row_tiles * column_tiles * (StreamKPlan::kQuarters * groups + Config::kChangeQuarters);
  const int64_t ranks =
      Ranks<kTileN>(row_tiles * column_tiles, groups,
                    std::min(slots, std::max<int64_t>(resident / Config::kCluster, 1)));
  // Work is counted in int, uint4s of the bitmap in uint32.
  if (ranks < 1 || most_work > INT32_MAX ||
      row_tiles * groups * Config::kStrips * kLanes > UINT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const StreamKPlan plan(row_tiles, column_tiles, BandTiles(problem.args.k, kTileN), groups, ranks,
                         Config::kWalksOn, Config::kChangeQuarters);
  const int64_t flag_bytes = ranks * Config::kStrips * int64_t{sizeof(uint64_t)};
  out.partials = static_cast<float4*>(problem.args.workspace);
  out.flags = reinterpret_cast<uint64_t*>(static_cast<uint8_t*>(problem.args.workspace) +
                                          ranks * slot - flag_bytes);
  out.ticket = NextTicket();
  if (MustClearFlags()) {
    error = cudaMemsetAsync(out.flags, 0, static_cast<size_t>(flag_bytes), problem.stream);
    if (error != cudaSuccess) return error;
  }
  Grid grid{ranks * Config::kCluster, Config::kThreads, Config::kSharedBytes};
  grid.cluster = Config::kCluster;
  return Launch(kKernel, grid, problem.stream, x, problem.w, plan, out);
}

template <typename T, int kTileN, typename Weight>
cudaError_t LaunchMma(const Problem<Weight>& problem, int64_t n0, int64_t n) {
  DenseInput x{};
  x.x = reinterpret_cast<const uint16_t*>(problem.x(n0));
  x.n = static_cast<int>(n);
  x.k = static_cast<int>(problem.args.k);
  x.aligned = x.k % 8 == 0 && reinterpret_cast<uintptr_t>(x.x) % 16 == 0;
  return LaunchStreamK<&LscdMmaKernel<T, kTileN, Weight>, MmaConfig<kTileN>, kTileN>(
      x, problem, problem.output(n0, n));
}

template <typename T, int kTileN, typename Weight>
cudaError_t LaunchWgmma(const Problem<Weight>& problem, int64_t n0, int64_t n) {
  using Config = WgmmaConfig<kTileN>;
  static_assert(kStepK == kTensorBox && kBoxRows == kTensorBox);
  const int64_t m = problem.args.m, k = problem.args.k;
  Output out = problem.output(n0, n);
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  WgmmaMaps maps{};
  cudaError_t error =
      EncodeTensorMap(maps.x, kType, const_cast<uint8_t*>(problem.x(n0)), n, k, Config::kBoxN);
  if (error != cudaSuccess) return error;
  out.in_boxes = Config::kStoresBoxes && !out.epilogue.is_float && m % 8 == 0 &&
                 reinterpret_cast<uintptr_t>(out.epilogue.y) % 16 == 0;
  if (out.in_boxes) {
    error = EncodeTensorMap(maps.y, kType, out.epilogue.y, n, m, Config::kBoxN);
    if (error != cudaSuccess) return error;
  }
  return LaunchStreamK<&LscdWgmmaKernel<T, kTileN, Weight>, Config, kTileN>(maps, problem, out);
}

template <typename T, typename Weight>
cudaError_t LaunchTiles(LscdKernel kernel, const Problem<Weight>& problem, int64_t n0,
                        ColumnTiles tiles) {
  const int64_t n = tiles.columns;
  if (kernel == LscdKernel::kMma) {
    switch (tiles.width) {
      case 8:
        return LaunchMma<T, 8>(problem, n0, n);
      case 16:
        return LaunchMma<T, 16>(problem, n0, n);
      default:
        return LaunchMma<T, 32>(problem, n0, n);
    }
  }
  switch (tiles.width) {
    case 8:
      return n <= 2 ? LaunchWgmma<T, 2>(problem, n0, n) : LaunchWgmma<T, 8>(problem, n0, n);
    case 16:
      return LaunchWgmma<T, 16>(problem, n0, n);
    case 32:
      return LaunchWgmma<T, 32>(problem, n0, n);
    case 64:
      return LaunchWgmma<T, 64>(problem, n0, n);
    case 128:
      return LaunchWgmma<T, 128>(problem, n0, n);
    case 256:
      return LaunchWgmma<T, 256>(problem, n0, n);
    default:
      return LaunchWgmma<T, kWidestTile.width>(problem, n0, n);
  }
}

ColumnTiles NextTiles(LscdKernel kernel, int64_t n, int64_t elements) {
  return kernel == LscdKernel::kMma ? NextMmaTiles(n) : NextWgmmaTiles(n, elements);
}

template <typename Weight>
cudaError_t LaunchAll(LscdKernel kernel, const Problem<Weight>& problem) {
  for (int64_t n0 = 0; n0 < problem.args.n;) {
    const ColumnTiles tiles =
        NextTiles(kernel, problem.args.n - n0, problem.args.m * problem.args.k);
    const cudaError_t error = problem.args.is_bfloat16
                                  ? LaunchTiles<__nv_bfloat16>(kernel, problem, n0, tiles)
                                  : LaunchTiles<__half>(kernel, problem, n0, tiles);
    if (error != cudaSuccess) return error;
    n0 += tiles.columns;
  }
  return cudaSuccess;
}

// The partial sums of as many ranks as a GPU can have.
int64_t WgmmaWorkspaceBytes(ColumnTiles tiles, int64_t m, int64_t k) {
  const auto bytes = [=](auto config) {
    using Config = decltype(config);
    const int64_t row_tiles = CeilDiv(m, Config::kTileM);
    const int64_t column_tiles = CeilDiv(tiles.columns, tiles.width);
    const int64_t units = row_tiles * column_tiles * LscdShape{m, k}.groups();
    return std::clamp<int64_t>(units, 1, kWorkspaceSlots / Config::kCluster) *
           SlotBytes(Config::kStrips, tiles.width);
  };
  if (tiles.width < 128) return bytes(WgmmaConfig<64>{});
  if (tiles.width == 128) return bytes(WgmmaConfig<128>{});
  return tiles.width == 256 ? bytes(WgmmaConfig<256>{}) : bytes(WgmmaConfig<kWidestTile.width>{});
}

}  // namespace

size_t LscdWorkspaceBytes(int64_t n, int64_t m, int64_t k) {
  int64_t most = 0;
  do {
    const ColumnTiles tiles = NextWgmmaTiles(n, m * k);
    most = std::max(most, WgmmaWorkspaceBytes(tiles, m, k));
    n -= tiles.columns;
  } while (n > 0);
  return static_cast<size_t>(most);
}

const char* LscdKernelUnavailable(const LscdMatmulArgs& args) {
  return args.kernel == LscdKernel::kWgmma ? WgmmaUnavailable(args) : nullptr;
}

cudaError_t LaunchLscdMatmul(const LscdMatmulArgs& args, cudaStream_t stream) {
  if (args.n == 0 || args.m == 0) return cudaSuccess;
  LscdKernel kernel = args.kernel;
  if (kernel == LscdKernel::kAuto) {
    kernel = WgmmaUnavailable(args) == nullptr ? LscdKernel::kWgmma : LscdKernel::kMma;
  }
  if (args.packed.layer == nullptr) {
    const Problem<PackedWeight> problem{args, MakePackedWeight(args.packed, args.m, args.k),
                                        stream};
    return LaunchAll(kernel, problem);
  }
  const Problem<PackedStack> problem{args, MakePackedStack(args.packed, args.m, args.k), stream};
  return LaunchAll(kernel, problem);
}

}  // namespace flashjax
