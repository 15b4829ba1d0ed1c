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
#define FLASHJAX_WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLASHJAX_WGMMA_SUMS_8 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FLASHJAX_WGMMA_NAMES_16 FLASHJAX_WGMMA_NAMES_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHJAX_WGMMA_SUMS_16 FLASHJAX_WGMMA_SUMS_8, \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), \
  "+f"(d[15])
#define FLASHJAX_WGMMA_NAMES_32 FLASHJAX_WGMMA_NAMES_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHJAX_WGMMA_SUMS_32 FLASHJAX_WGMMA_SUMS_16, \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), \
  "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
  "+f"(d[30]), "+f"(d[31])
#define FLASHJAX_WGMMA_NAMES_64 FLASHJAX_WGMMA_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASHJAX_WGMMA_SUMS_64 FLASHJAX_WGMMA_SUMS_32, \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), \
  "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), \
  "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), \
  "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
  "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FLASHJAX_WGMMA_NAMES_84 FLASHJAX_WGMMA_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83"
#define FLASHJAX_WGMMA_SUMS_84 FLASHJAX_WGMMA_SUMS_64, \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), \
  "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), \
  "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FLASHJAX_WGMMA_NAMES_88 FLASHJAX_WGMMA_NAMES_84 \
  ", %84, %85, %86, %87"
#define FLASHJAX_WGMMA_SUMS_88 FLASHJAX_WGMMA_SUMS_84, \
  "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FLASHJAX_WGMMA_NAMES_128 FLASHJAX_WGMMA_NAMES_88 \
  ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103" \
  ", %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117" \
  ", %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLASHJAX_WGMMA_SUMS_128 FLASHJAX_WGMMA_SUMS_88, \
  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), \
  "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), \
  "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), \
  "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), \
  "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
  "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), \
  "+f"(d[126]), "+f"(d[127])

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
