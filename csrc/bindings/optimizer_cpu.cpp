// CPU registrations of the staircase optimizers.
#include "cpu/optimizer_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "bindings/optimizer_args.h"

namespace sorted_kernels {
namespace {

// 16K elements of each operand stay within a core's L2 cache, and a chunk takes some microseconds.
constexpr int64_t kChunkElements = 16384;
// As torch's own element-wise operations: fewer elements than this are not worth a second thread.
constexpr int64_t kGrainElements = 32768;

// Runs `update(first_chunk, count)` over the table from torch's thread pool. Threads get equal
// numbers of elements, not of chunks: a chunk belongs to the thread in whose range it starts.
template <typename Update>
void parallel_chunks(const std::vector<Chunk>& chunks, const Update& update) {
  std::vector<int64_t> starts(chunks.size() + 1, 0);
  for (size_t i = 0; i < chunks.size(); ++i) {
    starts[i + 1] = starts[i] + int64_t(chunks[i].rows) * chunks[i].cols;
  }
  const auto first_from = [&](int64_t element) {
    return std::lower_bound(starts.begin(), starts.end() - 1, element) - starts.begin();
  };
  torch::stable::parallel_for(0, starts.back(), kGrainElements, [&](int64_t begin, int64_t end) {
    const int64_t first = first_from(begin);
    update(chunks.data() + first, first_from(end) - first);
  });
}

void check_known(bool known) {
  STD_TORCH_CHECK(known, "no kernel for these parameter and gradient dtypes");
}

void staircase_adamw_cpu(const TensorList params, const TensorList grads, const TensorList exp_avgs,
                         const TensorList exp_avg_sqs, const TensorList masters,
                         const std::vector<int64_t> bands, const std::vector<int64_t> steps,
                         double lr, double beta1, double beta2, double eps, double weight_decay,
                         bool maximize, bool clear_grads) {
  const AdamWOptions options{lr, beta1, beta2, eps, weight_decay, maximize, clear_grads};
  const OptimizerPlan plan =
      read_adamw(params, grads, exp_avgs, exp_avg_sqs, masters, bands, steps, options);
  const AdamWLoop loop = optimizer_loops().adamw;
  check_known(loop(nullptr, nullptr, 0, plan.types, options));
  parallel_chunks(plan.chunks(kChunkElements), [&](const Chunk* chunks, int64_t count) {
    loop(plan.tensors.data(), chunks, count, plan.types, options);
  });
}

void staircase_sgd_cpu(const TensorList params, const TensorList grads, const TensorList momentums,
                       const TensorList masters, const std::vector<int64_t> bands, double lr,
                       double momentum, double weight_decay, bool nesterov, bool maximize,
                       bool clear_grads) {
  const SgdOptions options{lr, momentum, weight_decay, nesterov, maximize, clear_grads};
  const OptimizerPlan plan = read_sgd(params, grads, momentums, masters, bands, options);
  const SgdLoop loop = optimizer_loops().sgd;
  check_known(loop(nullptr, nullptr, 0, plan.types, options));
  parallel_chunks(plan.chunks(kChunkElements), [&](const Chunk* chunks, int64_t count) {
    loop(plan.tensors.data(), chunks, count, plan.types, options);
  });
}

}  // namespace
}  // namespace sorted_kernels

STABLE_TORCH_LIBRARY_IMPL(sorted_kernels, CPU, library) {
  library.impl("staircase_adamw_", TORCH_BOX(&sorted_kernels::staircase_adamw_cpu));
  library.impl("staircase_sgd_", TORCH_BOX(&sorted_kernels::staircase_sgd_cpu));
}
