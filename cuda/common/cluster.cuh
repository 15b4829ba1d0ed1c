// The CTAs of a cluster (sm_90): their barrier and each other's shared memory.
#ifndef FLASHJAX_CUDA_COMMON_CLUSTER_CUH_
#define FLASHJAX_CUDA_COMMON_CLUSTER_CUH_

#include <cooperative_groups.h>

#include <cstdint>

namespace flashjax {

// What was written before arriving is seen by all threads of the cluster after waiting.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t InCluster(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ __forceinline__ int RankInCluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

#if __CUDA_ARCH__ >= 900
// Where another CTA has what is at `p`, in shared memory, here.
template <typename T>
__device__ __forceinline__ const T* InCluster(const T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#endif

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_CLUSTER_CUH_
