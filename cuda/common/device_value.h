// What a launcher asks of the driver once per device.
#ifndef FLASHJAX_CUDA_COMMON_DEVICE_VALUE_H_
#define FLASHJAX_CUDA_COMMON_DEVICE_VALUE_H_

#include <cuda_runtime_api.h>

#include <atomic>

namespace flashjax {

// Asking the driver at every call would cost more than a small product: a value per device, kept
// once it is known. Zero is unknown.
class PerDevice {
 public:
  template <typename Find>
  cudaError_t Get(int& value, Find find) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    if (device >= kDevices) return find(device, value);
    value = values_[device].load(std::memory_order_relaxed);
    if (value != 0) return cudaSuccess;
    const cudaError_t found = find(device, value);
    if (found == cudaSuccess) values_[device].store(value, std::memory_order_relaxed);
    return found;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> values_[kDevices] = {};
};

template <cudaDeviceAttr kAttribute>
int DeviceAttribute() {
  static PerDevice values;
  int value = 0;
  const cudaError_t error = values.Get(value, [](int device, int& value) {
    return cudaDeviceGetAttribute(&value, kAttribute, device);
  });
  return error == cudaSuccess ? value : 0;
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_COMMON_DEVICE_VALUE_H_
