// flashjax._cpu: the FFI handlers of the CPU, the host packer, and what the build found.
#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>

#include "bindings/numpy_arrays.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;

XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxLscdMatmulCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxLscdMatmulTransposedCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxLscdUnpackCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FlashjaxLscdSampleCpu);

// bindings/lscd_pack_py.cc
void BindPack(nb::module_& m);
// bindings/gather_pack_py.cc
void BindGatherPack(nb::module_& m);

namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict Registrations() {
  nb::dict out;
  out["flashjax_lscd_matmul_cpu"] = Capsule(FlashjaxLscdMatmulCpu);
  out["flashjax_lscd_matmul_transposed_cpu"] = Capsule(FlashjaxLscdMatmulTransposedCpu);
  out["flashjax_lscd_unpack_cpu"] = Capsule(FlashjaxLscdUnpackCpu);
  out["flashjax_lscd_sample_cpu"] = Capsule(FlashjaxLscdSampleCpu);
  return out;
}

nb::dict BuildInfo() {
  nb::dict out;
  out["jaxlib"] = FLASHJAX_BUILD_JAXLIB;
  out["compiler"] = FLASHJAX_BUILD_COMPILER;
  out["cuda_version"] = FLASHJAX_BUILD_CUDA_VERSION;
  out["cuda_architectures"] = FLASHJAX_BUILD_CUDA_ARCHITECTURES;
  out["cuda_missing"] = FLASHJAX_BUILD_CUDA_MISSING;
  return out;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("registrations", &Registrations, "FFI target name -> handler, for platform 'cpu'.");
  m.def(
      "xla_ffi_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "(major, minor) of the XLA FFI headers that this module was built with.");
  m.def("build_info", &BuildInfo, "What the build used, and why it left CUDA out if it did.");
  m.def(
      "empty_bytes", [](size_t count) { return flashjax::Empty<uint8_t>(count).array; },
      nb::arg("count"), "uint8 (count,), in memory that the system gets back (cpu/buffer.h).");
  BindPack(m);
  BindGatherPack(m);
}
