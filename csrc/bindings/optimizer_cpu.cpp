// CPU registrations of the staircase optimizers.
#include "cpu/optimizer_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "bindings/optimizer_call.h"

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

template <typename Call, typename Loop>
void run(const Call& call, Loop loop) {
  const OptimizerPlan& plan = call.plan;
  STD_TORCH_CHECK(loop(nullptr, nullptr, 0, plan.types, call.options),
                  "no kernel for these parameter and gradient dtypes");
  parallel_chunks(plan.chunks(kChunkElements), [&](const Chunk* chunks, int64_t count) {
    loop(plan.tensors.data(), chunks, count, plan.types, call.options);
  });
}

void staircase_adamw_cpu(StableIValue* stack, uint64_t, uint64_t) {
  run(AdamWCall(stack), optimizer_loops().adamw);
}

void staircase_sgd_cpu(StableIValue* stack, uint64_t, uint64_t) {
  run(SgdCall(stack), optimizer_loops().sgd);
}

}  // namespace
}  // namespace sorted_kernels

STABLE_TORCH_LIBRARY_IMPL(sorted_kernels, CPU, library) {
  library.impl("staircase_adamw_", sorted_kernels::staircase_adamw_cpu);
  library.impl("staircase_sgd_", sorted_kernels::staircase_sgd_cpu);
}
