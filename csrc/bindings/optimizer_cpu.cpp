// CPU registrations of the staircase optimizers.
#include "cpu/optimizer_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "bindings/optimizer_call.h"

namespace sorted_kernels {
namespace {

// A chunk takes about a microsecond: little to wait for when a thread ends with one more.
constexpr int64_t kChunkElements = 2048;
// As torch's own element-wise operations: fewer elements than this are not worth a second thread.
constexpr int64_t kGrainElements = 32768;

// The chunks that a thread begins with; others take from it when theirs are done.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Runs `update(chunk)` for each chunk on torch's threads. Equal shares are not equal times: one
// thread's part of the matrix may still be in its cache, and another's not.
template <typename Update>
void parallel_chunks(const std::vector<Chunk>& chunks, const Update& update) {
  const int64_t count = chunks.size();
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) {
    elements += int64_t(chunk.rows) * chunk.cols;
  }
  const int64_t wanted = (elements + kGrainElements - 1) / kGrainElements;
  const int64_t threads = std::clamp<int64_t>(wanted, 1, torch::stable::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = count * i / threads;
    shares[i].end = count * (i + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(first + i) % threads];
      for (int64_t next; (next = share.next.fetch_add(1)) < share.end;) {
        update(chunks[next]);
      }
    }
  });
}

template <typename Call, typename Loop>
void run(const Call& call, Loop loop) {
  const OptimizerPlan& plan = call.plan;
  STD_TORCH_CHECK(loop(nullptr, nullptr, 0, plan.types, call.options),
                  "no kernel for these parameter and gradient dtypes");
  parallel_chunks(plan.chunks(kChunkElements), [&](const Chunk& chunk) {
    loop(plan.tensors.data(), &chunk, 1, plan.types, call.options);
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
