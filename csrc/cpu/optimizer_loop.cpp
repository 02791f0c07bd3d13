// The CPU loops. CMake compiles this file once for each instruction set, with SK_ISA naming the
// namespace; only plain C headers may be included, so that the copies share no inline function.
#include "common/optimizer_update.h"
#include "cpu/optimizer_cpu.h"

namespace sorted_kernels {
namespace SK_ISA {
namespace {

template <typename T>
T* row_of(const TensorRecord& tensor, Operand operand, int64_t row, int64_t col) {
  T* base = static_cast<T*>(tensor.data[operand]);
  return base == nullptr ? nullptr : base + row * tensor.row_stride[operand] + col;
}

// Element loops differ in which operands they have, never in the arithmetic.
template <int kStates, bool kClear, typename P, typename G, typename C, typename Rule>
void update_row(P* __restrict__ param, G* __restrict__ grad, C* __restrict__ state,
                C* __restrict__ second_state, C* __restrict__ master, int64_t count,
                const Rule& rule, const typename Rule::PerTensor& tensor) {
  constexpr bool kMaster = ComputeType<P>::has_master;
  for (int64_t i = 0; i < count; ++i) {
    C value, first = 0, second = 0;
    if constexpr (kMaster) {
      value = master[i];
    } else {
      value = param[i];
    }
    if constexpr (kStates > 0) first = state[i];
    if constexpr (kStates > 1) second = second_state[i];
    rule(value, to_compute(grad[i]), first, second, tensor);
    if constexpr (kStates > 0) state[i] = first;
    if constexpr (kStates > 1) second_state[i] = second;
    if constexpr (kMaster) master[i] = value;
    round_to(value, param[i]);
    if constexpr (kClear) grad[i] = G{};
  }
}

// A prefix's rows lie apart, where the hardware does not look ahead: each stretch of elements asks
// for the one below it while it is updated.
constexpr int64_t kStretch = 64;

template <typename T>
void request(const T* elements, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(elements + i, 1);
}

template <bool kClear, typename P, typename G, typename Rule>
void update_chunks(const TensorRecord* tensors, const Chunk* chunks, int64_t count,
                   const Rule& rule) {
  using C = typename ComputeType<P>::type;
  for (const Chunk* chunk = chunks; chunk != chunks + count; ++chunk) {
    const TensorRecord& record = tensors[chunk->tensor];
    const typename Rule::PerTensor tensor(record);
    for (int64_t row = chunk->row_begin; row < chunk->row_begin + chunk->rows; ++row) {
      const bool ahead =
          record.row_stride[kParam] > chunk->cols && row + 1 < chunk->row_begin + chunk->rows;
      const int64_t end = chunk->col_begin + chunk->cols;
      for (int64_t col = chunk->col_begin; col < end; col += kStretch) {
        const int64_t count = end - col < kStretch ? end - col : kStretch;
        if (ahead) {
          request(row_of<P>(record, kParam, row + 1, col), count);
          request(row_of<G>(record, kGrad, row + 1, col), count);
          if (Rule::kStates > 0) request(row_of<C>(record, kState, row + 1, col), count);
          if (Rule::kStates > 1) request(row_of<C>(record, kSecondState, row + 1, col), count);
          if (ComputeType<P>::has_master) {
            request(row_of<C>(record, kMaster, row + 1, col), count);
          }
        }
        update_row<Rule::kStates, kClear>(
            row_of<P>(record, kParam, row, col), row_of<G>(record, kGrad, row, col),
            row_of<C>(record, kState, row, col), row_of<C>(record, kSecondState, row, col),
            row_of<C>(record, kMaster, row, col), count, rule, tensor);
      }
    }
  }
}

template <typename P, typename G, typename Rule>
void update(const TensorRecord* tensors, const Chunk* chunks, int64_t count, const Rule& rule,
            bool clear_grads) {
  if (clear_grads) {
    update_chunks<true, P, G>(tensors, chunks, count, rule);
  } else {
    update_chunks<false, P, G>(tensors, chunks, count, rule);
  }
}

bool adamw(const TensorRecord* tensors, const Chunk* chunks, int64_t count, UpdateTypes types,
           const AdamWOptions& options) {
  return visit_types(types, [&](auto* param, auto* grad) {
    using P = typename Pointee<decltype(param)>::type;
    using G = typename Pointee<decltype(grad)>::type;
    const AdamW<typename ComputeType<P>::type> rule(options);
    update<P, G>(tensors, chunks, count, rule, options.clear_grads);
  });
}

bool sgd(const TensorRecord* tensors, const Chunk* chunks, int64_t count, UpdateTypes types,
         const SgdOptions& options) {
  return visit_types(types, [&](auto* param, auto* grad) {
    using P = typename Pointee<decltype(param)>::type;
    using G = typename Pointee<decltype(grad)>::type;
    using C = typename ComputeType<P>::type;
    if (options.momentum != 0) {
      update<P, G>(tensors, chunks, count, Sgd<C, true>(options), options.clear_grads);
    } else {
      update<P, G>(tensors, chunks, count, Sgd<C, false>(options), options.clear_grads);
    }
  });
}

}  // namespace

const OptimizerLoops loops = {adamw, sgd};

}  // namespace SK_ISA
}  // namespace sorted_kernels
