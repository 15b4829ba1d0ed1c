// flashjax._cuda: the FFI handlers of the GPU. Present only where the build had nvcc.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "cuda/lscd_matmul_launch.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;

XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxLscdMatmulCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxLscdUnpackCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxLscdSampleCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxLscdPackSizesCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxLscdPackCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxGatherMatmulCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxGatherUnpackCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxDecodeAttentionCuda);

namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict Registrations() {
  nb::dict out;
  out["flashjax_lscd_matmul_cuda"] = Capsule(FlashjaxLscdMatmulCuda);
  out["flashjax_lscd_unpack_cuda"] = Capsule(FlashjaxLscdUnpackCuda);
  out["flashjax_lscd_sample_cuda"] = Capsule(FlashjaxLscdSampleCuda);
  out["flashjax_lscd_pack_sizes_cuda"] = Capsule(FlashjaxLscdPackSizesCuda);
  out["flashjax_lscd_pack_cuda"] = Capsule(FlashjaxLscdPackCuda);
  out["flashjax_gather_matmul_cuda"] = Capsule(FlashjaxGatherMatmulCuda);
  out["flashjax_gather_unpack_cuda"] = Capsule(FlashjaxGatherUnpackCuda);
  out["flashjax_decode_attention_cuda"] = Capsule(FlashjaxDecodeAttentionCuda);
  return out;
}

int DeviceCount() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string DriverError() {
  // cudaGetDeviceCount calls a missing driver an insufficient one.
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess && version == 0) {
    return "no NVIDIA driver is installed";
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.def("registrations", &Registrations, "FFI target name -> handler, for platform 'CUDA'.");
  m.def(
      "xla_ffi_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "(major, minor) of the XLA FFI headers that this module was built with.");
  m.def("device_count", &DeviceCount, "GPUs that the CUDA runtime sees; 0 after an error.");
  m.def(
      "workspace_bytes",
      [](int64_t n, int64_t m, int64_t k) { return flashjax::LscdWorkspaceBytes(n, m, k); },
      nb::arg("n"), nb::arg("m"), nb::arg("k"),
      "Bytes of the workspace result of flashjax_lscd_matmul_cuda.");
  m.def("driver_error", &DriverError, "What the CUDA runtime says is wrong; '' if nothing.");
}
