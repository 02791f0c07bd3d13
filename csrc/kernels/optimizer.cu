#include <algorithm>

#include "kernels/multiprocessors.cuh"
#include "kernels/optimizer_kernel.cuh"
#include "kernels/optimizer_launch.h"

namespace sorted_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 2048 / kThreads;  // a full complement of threads
constexpr int64_t kMinChunk = 4096;
constexpr int64_t kMaxChunk = 65536;

// Runs on a generic launcher so that both optimizers share grid and error handling.
struct Launcher {
  const TensorRecord* tensors;
  const Chunk* chunks;
  int64_t chunk_count;
  bool clear_grads;
  int device;
  void* stream;

  template <typename Kernel, typename Rule>
  void operator()(Kernel kernel, const Rule& rule) const {
    const int64_t resident = int64_t(multiprocessors(device)) * kBlocksPerProcessor;
    const unsigned blocks = unsigned(std::min(chunk_count, resident));
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(tensors, chunks, chunk_count,
                                                                       rule, clear_grads);
  }
};

const char* outcome(bool known_types) {
  if (!known_types) {
    return "no kernel for these parameter and gradient dtypes";
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t cuda_chunk_elements(int64_t elements, int device) {
  // Four chunks for each resident block even out the ragged ends. Powers of two keep alignment.
  const int64_t target = elements / (int64_t(multiprocessors(device)) * kBlocksPerProcessor * 4);
  int64_t chunk = kMinChunk;
  while (chunk < target && chunk < kMaxChunk) {
    chunk *= 2;
  }
  return chunk;
}

const char* launch_adamw(const TensorRecord* tensors, const Chunk* chunks, int64_t chunk_count,
                         UpdateTypes types, const AdamWOptions& options, int device, void* stream) {
  const Launcher launcher{tensors, chunks, chunk_count, options.clear_grads, device, stream};
  return outcome(with_adamw_kernel(types, options, launcher));
}

const char* launch_sgd(const TensorRecord* tensors, const Chunk* chunks, int64_t chunk_count,
                       UpdateTypes types, const SgdOptions& options, int device, void* stream) {
  const Launcher launcher{tensors, chunks, chunk_count, options.clear_grads, device, stream};
  return outcome(with_sgd_kernel(types, options, launcher));
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace sorted_kernels
