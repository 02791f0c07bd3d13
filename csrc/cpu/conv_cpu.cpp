#include "cpu/conv_cpu.h"

#include "cpu/isa.h"

namespace sorted_kernels {

const ConvLoops& conv_loops(int64_t out_cols) {
#if defined(SORTED_KERNELS_X86)
  if (best_isa() == Isa::kAvx512 && out_cols > 8) {
    return avx512::conv_loops;
  }
  if (best_isa() >= Isa::kAvx2) {
    return avx2::conv_loops;
  }
#endif
  return portable::conv_loops;
}

}  // namespace sorted_kernels
