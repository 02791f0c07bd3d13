// Runs each of the optimizers' implementations on host memory, for tests.
#pragma once

#include <string>

#include "host/optimizer_plan.h"

namespace sorted_kernels {

// How to run: engine "simt" is the CUDA kernel's body on `blocks` x `threads` emulated threads;
// "portable" and "avx2" are the CPU loops for these instruction sets.
struct HostRun {
  std::string engine;
  int64_t chunk_elements;
  unsigned blocks, threads;
};

// Throw std::invalid_argument when the dtypes have no kernel, or the engine cannot run here.
void run_on_host(const OptimizerPlan& plan, const AdamWOptions& options, const HostRun& run);
void run_on_host(const OptimizerPlan& plan, const SgdOptions& options, const HostRun& run);

}  // namespace sorted_kernels
