// Runs the CUDA optimizer kernel's body on the CPU.
#pragma once

#include "host/optimizer_plan.h"

namespace sorted_kernels {

struct ShimGrid {
  int64_t chunk_elements;
  unsigned blocks, threads;
};

// False when the types have no kernel.
bool shim_adamw(const OptimizerPlan& plan, const AdamWOptions& options, const ShimGrid& grid);
bool shim_sgd(const OptimizerPlan& plan, const SgdOptions& options, const ShimGrid& grid);

}  // namespace sorted_kernels
