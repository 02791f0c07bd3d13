// What an optimizer kernel is given: a table of tensors and a table of chunks. Both are plain data,
// shared by the planning code, the CPU loop and the CUDA kernel.
#pragma once

#include <cstdint>

namespace sorted_kernels {

// One rectangle of one tensor. The tables of a call cover every active element exactly once.
struct Chunk {
  int64_t row_begin;
  int64_t col_begin;
  int32_t rows;
  int32_t cols;
  int32_t tensor;
  int32_t padding;
};

// The tensors that move together with one parameter. Absent ones have a null pointer.
enum Operand : int { kParam, kGrad, kState, kSecondState, kMaster, kOperands };

struct TensorRecord {
  void* data[kOperands];
  int64_t row_stride[kOperands];  // in elements; the inner stride is always 1
  double step_size;               // AdamW: lr / (1 - beta1^step)
  double inv_sqrt_bias2;          // AdamW: 1 / sqrt(1 - beta2^step)
};

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Moments and master have the compute type: float for half-precision parameters, else the
// parameter's own type.
struct UpdateTypes {
  DType param;
  DType grad;
};

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize, clear_grads;
};

struct SgdOptions {
  double lr, momentum, weight_decay;
  bool nesterov, maximize, clear_grads;
};

}  // namespace sorted_kernels
