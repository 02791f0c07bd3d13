#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace sorted_kernels {
namespace {

Isa processor_isa() {
#if defined(SORTED_KERNELS_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return __builtin_cpu_supports("avx512f") ? Isa::kAvx512 : Isa::kAvx2;
  }
#endif
  return Isa::kPortable;
}

Isa allowed_isa() {
  const char* setting = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = setting == nullptr ? "" : setting;
  return most == "default" ? Isa::kPortable : most == "avx2" ? Isa::kAvx2 : Isa::kAvx512;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = std::min(processor_isa(), allowed_isa());
  return isa;
}

}  // namespace sorted_kernels
