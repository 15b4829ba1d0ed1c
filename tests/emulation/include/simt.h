// A GPU on the CPU, just large enough to run the kernels of cuda/: it checks what they compute
// where no GPU is, not how fast.
//
// A CTA is a set of fibers, one a thread; CTAs, or clusters of them, run one after the other in the
// order of blockIdx, which is the order in which a GPU starts them. A warp's collectives wait until
// every living lane has come; lanes that come to different collectives are an error, and so is a
// CTA in which nobody can go on. Asynchronous copies and products happen as late as the program's
// waits allow, and the target of a copy under way is filled with garbage, so that a missing wait
// shows.
#ifndef FLASHJAX_TESTS_EMULATION_SIMT_H_
#define FLASHJAX_TESTS_EMULATION_SIMT_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // CTAs run one after the other; not for clusters
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL
#define FLASHJAX_HAS_SM90A

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// Of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

inline constexpr int kWarpSize = 32;
inline constexpr uint32_t kSharedBytes = 232448;  // of a CTA, on Hopper

// Of the CTA that runs.
extern uint8_t* shared_memory;

// Runs a kernel over a grid, whose CTAs form clusters of so many along x. Returns whether it came
// to its end; if not, error() says why.
bool Run(dim3 grid, dim3 block, unsigned cluster, uint32_t shared_bytes,
         const std::function<void()>& kernel);
const char* error();

// Ends the kernel with an error; does not return to the calling thread.
[[noreturn]] void Fail(const char* format, ...);

// Lets the other threads go on until the condition holds.
void WaitUntil(const std::function<bool()>& condition);

// A barrier of the CTA's living threads.
void SyncBlock();

// A barrier of the cluster's threads, the CTA's rank, and another CTA's place for what is in shared
// memory.
void ArriveAtCluster();
void WaitForCluster();
int RankInCluster();
const void* InCluster(const void* p, int rank);
// Does something with the shared memory and the mbarriers of another CTA of the cluster.
void AsCta(int rank, const std::function<void()>& action);

// A rendezvous of the warp's living lanes. Every lane brings `size` bytes; returns the lanes'
// bytes, kLaneBytes apart, valid until the lane's next rendezvous.
inline constexpr size_t kLaneBytes = 64;
const uint8_t* Exchange(const char* what, const void* bytes, size_t size);
int Lane();
bool IsAlive(int lane);

template <typename T, typename Combine>
T Reduce(const char* what, T value, Combine combine) {
  const uint8_t* all = Exchange(what, &value, sizeof(T));
  bool any = false;
  T result{};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!IsAlive(lane)) continue;
    T other;
    std::memcpy(&other, all + lane * kLaneBytes, sizeof(T));
    result = any ? combine(result, other) : other;
    any = true;
  }
  return result;
}

// Shared memory by its 32-bit address.
uint8_t* SharedBytes(uint32_t address, uint32_t size);
uint32_t SharedAddressOf(const void* p);

// --- asynchronous work of the running thread

void CopyAsync(uint32_t dst, const void* src, uint32_t size);
void CommitCopies();
void WaitForCopies(size_t pending_groups);

// A product that reads its registers when it is waited for. Its waits are collectives of the warp.
void StartProduct(std::function<void()> product);
void CommitProducts();
void WaitForProducts(size_t pending_groups);

// A store from shared memory, which it reads when it is waited for.
void StartStore(std::function<void()> store);
void FinishStores();

// --- mbarriers

void InitBarrier(uint32_t address, uint32_t count);
void ArriveAtBarrier(uint32_t address, uint32_t expected_bytes);
void WaitForBarrier(uint32_t address, uint32_t parity);
// A copy of one box into shared memory, done when somebody waits for the barrier.
void CopyWithBarrier(uint32_t barrier, uint32_t dst, uint32_t size, std::function<void()> copy);

}  // namespace simt

// --- CUDA's built-in functions, those that are used

inline uint32_t __popc(uint32_t v) { return __builtin_popcount(v); }

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t{b} << 32) | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) {
    v |= static_cast<uint32_t>((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  }
  return v;
}

inline int __ffs(int v) { return __builtin_ffs(v); }

inline float __uint_as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int8_t(a >> (8 * i)) * int8_t(b >> (8 * i));
  return c;
}

inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i) c += ((a >> (8 * i)) & 0xff) * ((b >> (8 * i)) & 0xff);
  return c;
}

inline uint32_t __dp2a_hi(uint32_t a, uint32_t b, uint32_t c) {
  return c + (a & 0xffff) * ((b >> 16) & 0xff) + (a >> 16) * (b >> 24);
}

inline void __syncthreads() { simt::SyncBlock(); }
inline void __syncwarp() { simt::Exchange("__syncwarp", nullptr, 0); }

template <typename T>
T __shfl_sync(uint32_t, T value, int source) {
  T result;
  const uint8_t* all = simt::Exchange("__shfl_sync", &value, sizeof(T));
  std::memcpy(&result, all + source % simt::kWarpSize * simt::kLaneBytes, sizeof(T));
  return result;
}

template <typename T>
T __shfl_xor_sync(uint32_t, T value, int lanes) {
  T result;
  const uint8_t* all = simt::Exchange("__shfl_xor_sync", &value, sizeof(T));
  const int source = simt::Lane() ^ lanes;
  std::memcpy(&result, all + source * simt::kLaneBytes, sizeof(T));
  return result;
}

inline bool __all_sync(uint32_t, bool value) {
  return simt::Reduce("__all_sync", value, [](bool a, bool b) { return a && b; });
}

template <typename T>
T __reduce_min_sync(uint32_t, T v) {
  return simt::Reduce("__reduce_min_sync", v, [](T a, T b) { return b < a ? b : a; });
}
template <typename T>
T __reduce_max_sync(uint32_t, T v) {
  return simt::Reduce("__reduce_max_sync", v, [](T a, T b) { return a < b ? b : a; });
}
template <typename T>
T __reduce_add_sync(uint32_t, T v) {
  return simt::Reduce("__reduce_add_sync", v, [](T a, T b) { return a + b; });
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T v) {
  *p = v;
}

template <typename A, typename B>
constexpr auto min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr auto max(A a, B b) {
  return a < b ? b : a;
}

#endif  // FLASHJAX_TESTS_EMULATION_SIMT_H_
