// The CTAs of a cluster (sm_90): their barrier and each other's shared memory.
#ifndef FLASHJAX_CUDA_COMMON_CLUSTER_CUH_
#define FLASHJAX_CUDA_COMMON_CLUSTER_CUH_

#include <cooperative_groups.h>

namespace flashjax {

#if __CUDA_ARCH__ >= 900
// What was written before arriving is seen by all threads of the cluster after waiting.
__device__ __forceinline__ void ClusterArrive() {
  cooperative_groups::this_cluster().barrier_arrive();
}
__device__ __forceinline__ void ClusterWait() { cooperative_groups::this_cluster().barrier_wait(); }

// Where another CTA has what is at `p`, in shared memory, here.
template <typename T>
__device__ __forceinline__ const T* InCluster(const T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#endif

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_CLUSTER_CUH_
