#include "host/shim_optimizer.h"

#include "host/simt_shim.h"
#include "kernels/optimizer_kernel.cuh"

namespace sorted_kernels {
namespace {

struct ShimLauncher {
  const OptimizerPlan& plan;
  const std::vector<Chunk>& chunks;
  bool clear_grads;
  const ShimGrid& grid;

  template <typename Kernel, typename Rule>
  void operator()(Kernel kernel, const Rule& rule) const {
    run_grid(grid.blocks, grid.threads, kernel, plan.tensors.data(), chunks.data(),
             int64_t(chunks.size()), rule, clear_grads);
  }
};

}  // namespace

bool shim_adamw(const OptimizerPlan& plan, const AdamWOptions& options, const ShimGrid& grid) {
  const std::vector<Chunk> chunks = plan.chunks(grid.chunk_elements);
  return with_adamw_kernel(plan.types, options,
                           ShimLauncher{plan, chunks, options.clear_grads, grid});
}

bool shim_sgd(const OptimizerPlan& plan, const SgdOptions& options, const ShimGrid& grid) {
  const std::vector<Chunk> chunks = plan.chunks(grid.chunk_elements);
  return with_sgd_kernel(plan.types, options,
                         ShimLauncher{plan, chunks, options.clear_grads, grid});
}

}  // namespace sorted_kernels
