#include "cpu/optimizer_cpu.h"

#include "cpu/isa.h"

namespace sorted_kernels {

const OptimizerLoops& optimizer_loops() {
#if defined(SORTED_KERNELS_X86)
  if (best_isa() >= Isa::kAvx2) {
    return avx2::loops;
  }
#endif
  return portable::loops;
}

}  // namespace sorted_kernels
