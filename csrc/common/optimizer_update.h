// The update of one element, written once for the CPU loop and the CUDA kernel.
#pragma once

#include <math.h>

#include "common/half_types.h"
#include "common/optimizer_table.h"

namespace sorted_kernels {

// Type in which a parameter of type T is updated; half precision goes through a float master.
template <typename T>
struct ComputeType {
  using type = float;
  static constexpr bool has_master = true;
};
template <>
struct ComputeType<float> {
  using type = float;
  static constexpr bool has_master = false;
};
template <>
struct ComputeType<double> {
  using type = double;
  static constexpr bool has_master = false;
};

SK_INLINE float square_root(float value) { return sqrtf(value); }
SK_INLINE double square_root(double value) { return sqrt(value); }

// AdamW (Loshchilov and Hutter, algorithm 2) with torch.optim.AdamW's order of operations.
template <typename T>
struct AdamW {
  static constexpr int kStates = 2;

  T decay, grad_sign, first_rate, second_decay, second_rate, eps;

  SK_INLINE explicit AdamW(const AdamWOptions& options)
      : decay(T(1 - options.lr * options.weight_decay)),
        grad_sign(options.maximize ? T(-1) : T(1)),
        first_rate(T(1 - options.beta1)),
        second_decay(T(options.beta2)),
        second_rate(T(1 - options.beta2)),
        eps(T(options.eps)) {}

  // What differs from tensor to tensor: the bias corrections, which depend on its step count.
  struct PerTensor {
    T step_size, inv_sqrt_bias2;
    SK_INLINE explicit PerTensor(const TensorRecord& record)
        : step_size(T(record.step_size)), inv_sqrt_bias2(T(record.inv_sqrt_bias2)) {}
  };

  SK_INLINE void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq,
                            const PerTensor& tensor) const {
    grad *= grad_sign;
    exp_avg += first_rate * (grad - exp_avg);
    exp_avg_sq = second_decay * exp_avg_sq + second_rate * grad * grad;
    const T denominator = square_root(exp_avg_sq) * tensor.inv_sqrt_bias2 + eps;
    param = param * decay - tensor.step_size * (exp_avg / denominator);
  }
};

// SGD with momentum and coupled weight decay, dampening 0, as torch.optim.SGD. A momentum buffer
// of zeros gives torch's first step, which copies the gradient. The second state is unused.
template <typename T, bool kMomentum>
struct Sgd {
  static constexpr int kStates = kMomentum ? 1 : 0;

  T lr, grad_sign, momentum, weight_decay;
  bool nesterov;

  SK_INLINE explicit Sgd(const SgdOptions& options)
      : lr(T(options.lr)),
        grad_sign(options.maximize ? T(-1) : T(1)),
        momentum(T(options.momentum)),
        weight_decay(T(options.weight_decay)),
        nesterov(options.nesterov) {}

  struct PerTensor {
    SK_INLINE explicit PerTensor(const TensorRecord&) {}
  };

  SK_INLINE void operator()(T& param, T grad, T& buffer, T&, const PerTensor&) const {
    grad = grad_sign * grad + weight_decay * param;
    if (kMomentum) {
      buffer = momentum * buffer + grad;
      grad = nesterov ? grad + momentum * buffer : buffer;
    }
    param -= lr * grad;
  }
};

template <typename Pointer>
struct Pointee;
template <typename T>
struct Pointee<T*> {
  using type = T;
};

// Calls `visit` with null pointers of the parameter's and the gradient's types; false when no
// kernel exists for the pair.
template <typename Visitor>
bool visit_types(UpdateTypes types, const Visitor& visit) {
  const auto pair = [&](DType param, DType grad) {
    return types.param == param && types.grad == grad;
  };
  if (pair(DType::kFloat32, DType::kFloat32)) {
    visit((float*)nullptr, (float*)nullptr);
  } else if (pair(DType::kFloat64, DType::kFloat64)) {
    visit((double*)nullptr, (double*)nullptr);
  } else if (pair(DType::kBFloat16, DType::kBFloat16)) {
    visit((BFloat16*)nullptr, (BFloat16*)nullptr);
  } else if (pair(DType::kBFloat16, DType::kFloat32)) {
    visit((BFloat16*)nullptr, (float*)nullptr);
  } else if (pair(DType::kFloat16, DType::kFloat16)) {
    visit((Float16*)nullptr, (Float16*)nullptr);
  } else if (pair(DType::kFloat16, DType::kFloat32)) {
    visit((Float16*)nullptr, (float*)nullptr);
  } else {
    return false;
  }
  return true;
}

}  // namespace sorted_kernels
