// wgmma with A in registers and B in shared memory (sm_90a): D[64 x N] += A[64 x 16] B[16 x N],
// float32 accumulation. A warp's share of A and D is that of mma.sync.m16n8k16 for its 16 rows.
#ifndef FLASHJAX_CUDA_COMMON_WGMMA_CUH_
#define FLASHJAX_CUDA_COMMON_WGMMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashjax {

template <typename T, int N>
struct Tile {};

__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Moving registers between warpgroups; what is claimed must have been released, or the warp waits.
template <int kRegisters>
__device__ __forceinline__ void ClaimRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void ReleaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The descriptor of a K-major B tile of rows of 128 bytes with the 128-byte swizzle: `low` holds
// address / 16 and a leading offset of 1 (unused here); the stride between groups of 8 rows is 1024
// B.
__device__ __forceinline__ uint32_t WgmmaDescriptorLow(uint32_t address) {
  return ((address & 0x3ffffu) >> 4) | 0x10000u;
}

__device__ __forceinline__ uint64_t WgmmaDescriptor(uint32_t low) {
  return (uint64_t{0x40000040u} << 32) | low;
}

// An instruction names its 8 to 128 sums one by one, so each list is the one before and more.
// clang-format off
#define FLASHJAX_WGMMA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLASHJAX_WGMMA_8(i) FLASHJAX_WGMMA_4(i), FLASHJAX_WGMMA_4(i + 4)
#define FLASHJAX_WGMMA_16(i) FLASHJAX_WGMMA_8(i), FLASHJAX_WGMMA_8(i + 8)
#define FLASHJAX_WGMMA_32(i) FLASHJAX_WGMMA_16(i), FLASHJAX_WGMMA_16(i + 16)
#define FLASHJAX_WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLASHJAX_WGMMA_NAMES_16 FLASHJAX_WGMMA_NAMES_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHJAX_WGMMA_NAMES_32 FLASHJAX_WGMMA_NAMES_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHJAX_WGMMA_NAMES_64 FLASHJAX_WGMMA_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASHJAX_WGMMA_NAMES_84 FLASHJAX_WGMMA_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83"
#define FLASHJAX_WGMMA_NAMES_88 FLASHJAX_WGMMA_NAMES_84 \
  ", %84, %85, %86, %87"
#define FLASHJAX_WGMMA_NAMES_128 FLASHJAX_WGMMA_NAMES_88 \
  ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103" \
  ", %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117" \
  ", %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLASHJAX_WGMMA_SUMS_8 FLASHJAX_WGMMA_8(0)
#define FLASHJAX_WGMMA_SUMS_16 FLASHJAX_WGMMA_16(0)
#define FLASHJAX_WGMMA_SUMS_32 FLASHJAX_WGMMA_32(0)
#define FLASHJAX_WGMMA_SUMS_64 FLASHJAX_WGMMA_SUMS_32, FLASHJAX_WGMMA_32(32)
#define FLASHJAX_WGMMA_SUMS_84 FLASHJAX_WGMMA_SUMS_64, FLASHJAX_WGMMA_16(64), FLASHJAX_WGMMA_4(80)
#define FLASHJAX_WGMMA_SUMS_88 FLASHJAX_WGMMA_SUMS_84, FLASHJAX_WGMMA_4(84)
#define FLASHJAX_WGMMA_SUMS_128 FLASHJAX_WGMMA_SUMS_88, FLASHJAX_WGMMA_8(88), FLASHJAX_WGMMA_32(96)

// For N columns of T, which PTX calls `type`: the count of sums, then the places of a[0..3] and b.
#define FLASHJAX_WGMMA_OF(T, type, N, count, a0, a1, a2, a3, b0)                                  \
  __device__ __forceinline__ void Wgmma(Tile<T, N>, float* d, const uint32_t* a, uint64_t b) {    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type                  \
                 " {" FLASHJAX_WGMMA_NAMES_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3      \
                 "}, %" #b0 ", 1, 1, 1, 0;"                                                       \
                 : FLASHJAX_WGMMA_SUMS_##count                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                           \
  }
#define FLASHJAX_WGMMA(...)                        \
  FLASHJAX_WGMMA_OF(__half, "f16", __VA_ARGS__)    \
  FLASHJAX_WGMMA_OF(__nv_bfloat16, "bf16", __VA_ARGS__)

FLASHJAX_WGMMA(16, 8, 8, 9, 10, 11, 12)
FLASHJAX_WGMMA(32, 16, 16, 17, 18, 19, 20)
FLASHJAX_WGMMA(64, 32, 32, 33, 34, 35, 36)
FLASHJAX_WGMMA(128, 64, 64, 65, 66, 67, 68)
FLASHJAX_WGMMA(168, 84, 84, 85, 86, 87, 88)
FLASHJAX_WGMMA(176, 88, 88, 89, 90, 91, 92)
FLASHJAX_WGMMA(256, 128, 128, 129, 130, 131, 132)
// clang-format on

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_WGMMA_CUH_
