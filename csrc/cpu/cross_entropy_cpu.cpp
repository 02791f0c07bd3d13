#include "cpu/cross_entropy_cpu.h"

#include "cpu/isa.h"

namespace sorted_kernels {

const AllCrossEntropyLoops& cross_entropy_loops() {
#if defined(SORTED_KERNELS_X86)
  if (best_isa() == Isa::kAvx512) {
    return avx512::cross_entropy_loops;
  }
  if (best_isa() == Isa::kAvx2) {
    return avx2::cross_entropy_loops;
  }
#endif
  return portable::cross_entropy_loops;
}

}  // namespace sorted_kernels
