// Multi-tensor staircase optimizer: device code. No torch header, and nothing that the host shim
// (host/simt_shim.h) lacks, so that tests run this very code on a CPU.
//
// Blocks walk the chunk table with a grid stride. Within a chunk, threads take vectors of kVector
// elements where every operand is 16-byte aligned, and single elements elsewhere. The kernel moves
// bytes and nothing else matters: each operand is read once and written once.
#pragma once

#include "common/optimizer_update.h"

namespace sorted_kernels {

// Elements per thread and step: 16 bytes of the narrowest operand.
template <typename P, typename G>
struct VectorWidth {
  static constexpr int value = 16 / (sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));
};

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Pack {
  T values[kWidth];
};

// The operands of one chunk: each pointer is at the chunk's first element.
template <typename P, typename G>
struct ChunkView {
  using C = typename ComputeType<P>::type;

  P* param;
  G* grad;
  C *state, *second_state, *master;
  int64_t stride[kOperands];

  __device__ ChunkView(const TensorRecord& tensor, const Chunk& chunk) {
    for (int i = 0; i < kOperands; ++i) {
      stride[i] = tensor.row_stride[i];
    }
    param = origin<P>(tensor, chunk, kParam);
    grad = origin<G>(tensor, chunk, kGrad);
    state = origin<C>(tensor, chunk, kState);
    second_state = origin<C>(tensor, chunk, kSecondState);
    master = origin<C>(tensor, chunk, kMaster);
  }

  // Whether each row of every operand in use starts on a 16-byte boundary.
  template <int kStates>
  __device__ bool aligned(const Chunk& chunk) const {
    uint64_t bits = misalignment(param, stride[kParam], chunk.rows) |
                    misalignment(grad, stride[kGrad], chunk.rows);
    if (kStates > 0) bits |= misalignment(state, stride[kState], chunk.rows);
    if (kStates > 1) bits |= misalignment(second_state, stride[kSecondState], chunk.rows);
    if (ComputeType<P>::has_master) bits |= misalignment(master, stride[kMaster], chunk.rows);
    return (bits & 15u) == 0;
  }

 private:
  template <typename T>
  __device__ static T* origin(const TensorRecord& tensor, const Chunk& chunk, Operand operand) {
    T* base = static_cast<T*>(tensor.data[operand]);
    return base + chunk.row_begin * tensor.row_stride[operand] + chunk.col_begin;
  }

  template <typename T>
  __device__ static uint64_t misalignment(const T* pointer, int64_t stride, int rows) {
    return uint64_t(pointer) | (rows > 1 ? uint64_t(stride) * sizeof(T) : 0);
  }
};

// Loads, updates and stores kWidth neighbouring elements.
template <int kWidth, typename P, typename G, typename Rule>
__device__ __forceinline__ void update_pack(const ChunkView<P, G>& view, int64_t row, int64_t col,
                                            const Rule& rule,
                                            const typename Rule::PerTensor& tensor,
                                            bool clear_grads) {
  using C = typename ComputeType<P>::type;
  using Values = Pack<C, kWidth>;
  auto* param = reinterpret_cast<Pack<P, kWidth>*>(view.param + row * view.stride[kParam] + col);
  auto* grad = reinterpret_cast<Pack<G, kWidth>*>(view.grad + row * view.stride[kGrad] + col);
  auto* state = reinterpret_cast<Values*>(view.state + row * view.stride[kState] + col);
  auto* second =
      reinterpret_cast<Values*>(view.second_state + row * view.stride[kSecondState] + col);
  auto* master = reinterpret_cast<Values*>(view.master + row * view.stride[kMaster] + col);

  const Pack<G, kWidth> gradient = *grad;
  Pack<P, kWidth> rounded;
  Values value, first_moment{}, second_moment{};
  if constexpr (ComputeType<P>::has_master) {
    value = *master;
  } else {
    value = *param;
  }
  if constexpr (Rule::kStates > 0) first_moment = *state;
  if constexpr (Rule::kStates > 1) second_moment = *second;
  SK_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    rule(value.values[i], to_compute(gradient.values[i]), first_moment.values[i],
         second_moment.values[i], tensor);
    round_to(value.values[i], rounded.values[i]);
  }
  if constexpr (Rule::kStates > 0) *state = first_moment;
  if constexpr (Rule::kStates > 1) *second = second_moment;
  if constexpr (ComputeType<P>::has_master) *master = value;
  *param = rounded;
  if (clear_grads) *grad = Pack<G, kWidth>{};
}

// Updates columns [col_begin, col_end) of a chunk's rows in packs of kWidth.
template <int kWidth, typename P, typename G, typename Rule>
__device__ __forceinline__ void update_columns(const ChunkView<P, G>& view, int rows, int col_begin,
                                               int col_end, const Rule& rule,
                                               const typename Rule::PerTensor& tensor,
                                               bool clear_grads) {
  const int per_row = (col_end - col_begin) / kWidth;
  const int total = rows * per_row;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    const int row = i / per_row;
    const int col = col_begin + (i - row * per_row) * kWidth;
    update_pack<kWidth>(view, row, col, rule, tensor, clear_grads);
  }
}

template <typename P, typename G, typename Rule>
__global__ void staircase_optimizer_kernel(const TensorRecord* tensors, const Chunk* chunks,
                                           int64_t chunk_count, Rule rule, bool clear_grads) {
  constexpr int kWidth = VectorWidth<P, G>::value;
  for (int64_t i = blockIdx.x; i < chunk_count; i += gridDim.x) {
    const Chunk chunk = chunks[i];
    const TensorRecord& record = tensors[chunk.tensor];
    const ChunkView<P, G> view(record, chunk);
    const typename Rule::PerTensor tensor(record);
    const bool vectors = view.template aligned<Rule::kStates>(chunk);
    const int body = vectors ? chunk.cols / kWidth * kWidth : 0;
    update_columns<kWidth>(view, chunk.rows, 0, body, rule, tensor, clear_grads);
    update_columns<1>(view, chunk.rows, body, chunk.cols, rule, tensor, clear_grads);
  }
}

// Calls `launch` with the kernel and its rule; false when the types have no kernel. The CUDA
// launcher and the host shim share it.
template <typename Launch>
bool with_adamw_kernel(UpdateTypes types, const AdamWOptions& options, const Launch& launch) {
  return visit_types(types, [&](auto* param, auto* grad) {
    using P = typename Pointee<decltype(param)>::type;
    using G = typename Pointee<decltype(grad)>::type;
    using Rule = AdamW<typename ComputeType<P>::type>;
    launch(staircase_optimizer_kernel<P, G, Rule>, Rule(options));
  });
}

template <typename Launch>
bool with_sgd_kernel(UpdateTypes types, const SgdOptions& options, const Launch& launch) {
  return visit_types(types, [&](auto* param, auto* grad) {
    using P = typename Pointee<decltype(param)>::type;
    using G = typename Pointee<decltype(grad)>::type;
    using C = typename ComputeType<P>::type;
    if (options.momentum != 0) {
      launch(staircase_optimizer_kernel<P, G, Sgd<C, true>>, Sgd<C, true>(options));
    } else {
      launch(staircase_optimizer_kernel<P, G, Sgd<C, false>>, Sgd<C, false>(options));
    }
  });
}

}  // namespace sorted_kernels
