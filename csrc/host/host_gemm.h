// The GEMM kernel's device code on host memory and fibers, for tests.
#pragma once

#include "host/gemm_schedule.h"
#include "kernels/gemm_launch.h"

namespace sorted_kernels {

// Runs the kernel that `launch` describes (its pointers are to host memory, its stream unused) one
// block after the other. The seed decides when copies land. Throws std::runtime_error if a block's
// threads wait for ever.
void run_gemm_on_host(const GemmLaunch& launch, uint64_t seed);

}  // namespace sorted_kernels
