// CUDA registrations of the staircase optimizers, under private names: Python decides whether a
// kernel that no GPU run has passed may be used.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "bindings/cuda_stream.h"
#include "bindings/optimizer_call.h"
#include "kernels/optimizer_launch.h"

namespace sorted_kernels {
namespace {

using torch::stable::Tensor;

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

template <typename Call, typename Launch>
void run(const Call& call, Launch launch) {
  const int64_t elements = count_elements(call.plan.bands);
  if (elements == 0) {
    return;
  }
  const int32_t device = call.device.index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = current_stream(device);
  STD_TORCH_CHECK(!is_capturing(stream),
                  "a staircase optimizer cannot be captured in a CUDA graph: learning rate, step "
                  "count and staircase are part of the launch");
  const DeviceTables tables =
      upload(call.plan, call.plan.chunks(cuda_chunk_elements(elements, device)), device);
  const char* error = launch(tables.tensors, tables.chunks, tables.chunk_count, call.plan.types,
                             call.options, device, stream);
  STD_TORCH_CHECK(error == nullptr, "staircase optimizer kernel: ", error);
}

void staircase_adamw_cuda(StableIValue* stack, uint64_t, uint64_t) {
  run(AdamWCall(stack), launch_adamw);
}

void staircase_sgd_cuda(StableIValue* stack, uint64_t, uint64_t) {
  run(SgdCall(stack), launch_sgd);
}

}  // namespace
}  // namespace sorted_kernels

STABLE_TORCH_LIBRARY_IMPL(sorted_kernels, CUDA, library) {
  library.impl("native_staircase_adamw_", sorted_kernels::staircase_adamw_cuda);
  library.impl("native_staircase_sgd_", sorted_kernels::staircase_sgd_cuda);
}
