#include "cpu/optimizer_cpu.h"

namespace sorted_kernels {

const OptimizerLoops& optimizer_loops() {
#if defined(SORTED_KERNELS_X86)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) {
    return avx2::loops;
  }
#endif
  return portable::loops;
}

}  // namespace sorted_kernels
