// Which of the builds of a CPU loop this processor can run.
#pragma once

namespace sorted_kernels {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The most that the processor has, and that torch's setting ATEN_CPU_CAPABILITY allows.
Isa best_isa();

}  // namespace sorted_kernels
