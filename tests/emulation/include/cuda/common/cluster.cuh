// cuda/common/cluster.cuh for the emulated device.
#ifndef FLASHJAX_CUDA_COMMON_CLUSTER_CUH_
#define FLASHJAX_CUDA_COMMON_CLUSTER_CUH_

#include "simt.h"

namespace flashjax {

inline void ClusterArrive() { simt::ArriveAtCluster(); }
inline void ClusterWait() { simt::WaitForCluster(); }
inline int RankInCluster() { return simt::RankInCluster(); }

// The rank above the address.
inline uint32_t InCluster(uint32_t address, int rank) {
  return address | static_cast<uint32_t>(rank) << 24;
}

template <typename T>
const T* InCluster(const T* p, int rank) {
  return static_cast<const T*>(simt::InCluster(p, rank));
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_CLUSTER_CUH_
