#include "host/host_optimizer.h"

#include <stdexcept>

#include "cpu/optimizer_cpu.h"
#include "host/simt_shim.h"
#include "kernels/optimizer_kernel.cuh"

namespace sorted_kernels {
namespace {

struct ShimLauncher {
  const OptimizerPlan& plan;
  const std::vector<Chunk>& chunks;
  bool clear_grads;
  const HostRun& run;

  template <typename Kernel, typename Rule>
  void operator()(Kernel kernel, const Rule& rule) const {
    run_grid(run.blocks, run.threads, kernel, plan.tensors.data(), chunks.data(),
             int64_t(chunks.size()), rule, clear_grads);
  }
};

const OptimizerLoops& loops_of(const std::string& engine) {
  if (engine == "portable") {
    return portable::loops;
  }
#if defined(SORTED_KERNELS_X86)
  if (engine == "avx2" && &optimizer_loops() == &avx2::loops) {
    return avx2::loops;
  }
#endif
  throw std::invalid_argument("engine='" + engine + "' is unknown, or this processor lacks it");
}

void check_known(bool known) {
  if (!known) {
    throw std::invalid_argument("no kernel for these parameter and gradient dtypes");
  }
}

}  // namespace

void run_on_host(const OptimizerPlan& plan, const AdamWOptions& options, const HostRun& run) {
  const std::vector<Chunk> chunks = plan.chunks(run.chunk_elements);
  if (run.engine == "simt") {
    const ShimLauncher launcher{plan, chunks, options.clear_grads, run};
    check_known(with_adamw_kernel(plan.types, options, launcher));
  } else {
    check_known(loops_of(run.engine)
                    .adamw(plan.tensors.data(), chunks.data(), int64_t(chunks.size()), plan.types,
                           options));
  }
}

void run_on_host(const OptimizerPlan& plan, const SgdOptions& options, const HostRun& run) {
  const std::vector<Chunk> chunks = plan.chunks(run.chunk_elements);
  if (run.engine == "simt") {
    const ShimLauncher launcher{plan, chunks, options.clear_grads, run};
    check_known(with_sgd_kernel(plan.types, options, launcher));
  } else {
    check_known(
        loops_of(run.engine)
            .sgd(plan.tensors.data(), chunks.data(), int64_t(chunks.size()), plan.types, options));
  }
}

}  // namespace sorted_kernels
