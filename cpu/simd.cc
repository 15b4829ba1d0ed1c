#include "cpu/simd.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace flashjax {
namespace {

constexpr const char* kVariable = "FLASHJAX_CPU_SIMD";

Simd MachineSimd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Simd::kAvx512;
  }
  if (avx2) return Simd::kAvx2;
#endif
  return Simd::kPortable;
}

bool ParseSimd(const char* name, Simd* simd) {
  for (const Simd s : {Simd::kPortable, Simd::kAvx2, Simd::kAvx512}) {
    if (std::strcmp(name, SimdName(s)) == 0) {
      *simd = s;
      return true;
    }
  }
  return false;
}

Simd InitialSimd() {
  const Simd machine = MachineSimd();
  const char* name = std::getenv(kVariable);
  Simd asked;
  if (name != nullptr && ParseSimd(name, &asked) && asked < machine) return asked;
  return machine;
}

std::atomic<Simd>& Active() {
  static std::atomic<Simd> active{InitialSimd()};
  return active;
}

}  // namespace

const char* SimdName(Simd simd) {
  switch (simd) {
    case Simd::kAvx512:
      return "avx512";
    case Simd::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

Simd ActiveSimd() { return Active().load(std::memory_order_relaxed); }

const char* UnknownSimdVariable() {
  const char* name = std::getenv(kVariable);
  Simd simd;
  return name != nullptr && !ParseSimd(name, &simd) ? name : nullptr;
}

bool SetSimd(const char* name) {
  Simd simd;
  if (!ParseSimd(name, &simd) || simd > MachineSimd()) return false;
  Active().store(simd, std::memory_order_relaxed);
  return true;
}

const LscdKernels& Kernels() {
#if defined(__x86_64__)
  switch (ActiveSimd()) {
    case Simd::kAvx512:
      return kAvx512Kernels;
    case Simd::kAvx2:
      return kAvx2Kernels;
    default:
      break;
  }
#endif
  return kPortableKernels;
}

}  // namespace flashjax
