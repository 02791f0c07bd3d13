#include "cpu/conv_cpu.h"

#include <cstdlib>
#include <string>

namespace sorted_kernels {

namespace {

// Whether torch's own setting, read as torch reads it, leaves an instruction set to be used.
bool allowed(const std::string& isa) {
  const char* most = std::getenv("ATEN_CPU_CAPABILITY");
  if (most == nullptr) return true;
  return std::string(most) != "default" && (isa == "avx2" || std::string(most) != "avx2");
}

}  // namespace

const ConvLoops& conv_loops(int64_t out_cols) {
#if defined(SORTED_KERNELS_X86)
  static const bool has_avx2 =
      allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = allowed("avx512") && has_avx2 && __builtin_cpu_supports("avx512f");
  if (has_avx512 && out_cols > 8) {
    return avx512::conv_loops;
  }
  if (has_avx2) {
    return avx2::conv_loops;
  }
#endif
  return portable::conv_loops;
}

}  // namespace sorted_kernels
