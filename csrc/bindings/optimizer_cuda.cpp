// CUDA registrations of the staircase optimizers, under private names: Python decides whether a
// kernel that no GPU run has passed may be used.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "bindings/optimizer_args.h"
#include "kernels/optimizer_launch.h"

// CPU builds of torch lack it, and this library loads there too: weak, so that it may be absent.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

namespace sorted_kernels {
namespace {

using torch::stable::Tensor;

void* current_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA support");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

// Both tables in one device buffer from torch's caching allocator. It is filled through pinned
// memory, which torch keeps until the copy is done, so that the host never waits for the stream.
struct DeviceTables {
  Tensor buffer;
  const TensorRecord* tensors;
  const Chunk* chunks;
  int64_t chunk_count;
};

DeviceTables upload(const OptimizerPlan& plan, const std::vector<Chunk>& chunks,
                    int32_t device_index) {
  using torch::headeronly::DeviceType;
  using torch::headeronly::ScalarType;
  const size_t record_bytes = plan.tensors.size() * sizeof(TensorRecord);
  const size_t chunk_bytes = chunks.size() * sizeof(Chunk);
  const std::vector<int64_t> size{int64_t(record_bytes + chunk_bytes)};
  Tensor staging = torch::stable::empty(size, ScalarType::Byte, std::nullopt,
                                        torch::stable::Device(DeviceType::CPU), true);
  char* bytes = static_cast<char*>(staging.mutable_data_ptr());
  std::memcpy(bytes, plan.tensors.data(), record_bytes);
  std::memcpy(bytes + record_bytes, chunks.data(), chunk_bytes);
  Tensor buffer =
      torch::stable::empty(size, ScalarType::Byte, std::nullopt,
                           torch::stable::Device(DeviceType::CUDA, device_index), std::nullopt);
  torch::stable::copy_(buffer, staging, /*non_blocking=*/true);
  const char* base = static_cast<const char*>(buffer.data_ptr());
  return {buffer, reinterpret_cast<const TensorRecord*>(base),
          reinterpret_cast<const Chunk*>(base + record_bytes), int64_t(chunks.size())};
}

template <typename Launch, typename Options>
void run(Launch launch, const OptimizerPlan& plan, const Options& options, int32_t device) {
  const int64_t elements = count_elements(plan.bands);
  if (elements == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = current_stream(device);
  STD_TORCH_CHECK(!is_capturing(stream),
                  "a staircase optimizer cannot be captured in a CUDA graph: learning rate, step "
                  "count and staircase are part of the launch");
  const DeviceTables tables =
      upload(plan, plan.chunks(cuda_chunk_elements(elements, device)), device);
  const char* error = launch(tables.tensors, tables.chunks, tables.chunk_count, plan.types, options,
                             device, stream);
  STD_TORCH_CHECK(error == nullptr, "staircase optimizer kernel: ", error);
}

void staircase_adamw_cuda(const TensorList params, const TensorList grads,
                          const TensorList exp_avgs, const TensorList exp_avg_sqs,
                          const TensorList masters, const std::vector<int64_t> bands,
                          const std::vector<int64_t> steps, double lr, double beta1, double beta2,
                          double eps, double weight_decay, bool maximize, bool clear_grads) {
  const AdamWOptions options{lr, beta1, beta2, eps, weight_decay, maximize, clear_grads};
  const OptimizerPlan plan =
      read_adamw(params, grads, exp_avgs, exp_avg_sqs, masters, bands, steps, options);
  run(launch_adamw, plan, options, device_of(params).index);
}

void staircase_sgd_cuda(const TensorList params, const TensorList grads, const TensorList momentums,
                        const TensorList masters, const std::vector<int64_t> bands, double lr,
                        double momentum, double weight_decay, bool nesterov, bool maximize,
                        bool clear_grads) {
  const SgdOptions options{lr, momentum, weight_decay, nesterov, maximize, clear_grads};
  const OptimizerPlan plan = read_sgd(params, grads, momentums, masters, bands, options);
  run(launch_sgd, plan, options, device_of(params).index);
}

}  // namespace
}  // namespace sorted_kernels

STABLE_TORCH_LIBRARY_IMPL(sorted_kernels, CUDA, library) {
  library.impl("native_staircase_adamw_", TORCH_BOX(&sorted_kernels::staircase_adamw_cuda));
  library.impl("native_staircase_sgd_", TORCH_BOX(&sorted_kernels::staircase_sgd_cuda));
}
