// The optimizer ops' calls, read from the stack alike for the CPU and for CUDA. The order of the
// arguments is that of the schemas in sorted_kernels/ops/optimizer.py.
#pragma once

#include "bindings/stable_list.h"

namespace sorted_kernels {

class AdamWCall {
 public:
  explicit AdamWCall(const StableIValue* stack);

 private:
  // First members: they have to own what is on the stack before anything can throw.
  TensorList params_, grads_, exp_avgs_, exp_avg_sqs_, masters_;
  const std::vector<int64_t> bands_, steps_;

 public:
  const AdamWOptions options;
  const DeviceId device;
  const OptimizerPlan plan;
};

class SgdCall {
 public:
  explicit SgdCall(const StableIValue* stack);

 private:
  TensorList params_, grads_, momentums_, masters_;
  const std::vector<int64_t> bands_;

 public:
  const SgdOptions options;
  const DeviceId device;
  const OptimizerPlan plan;
};

}  // namespace sorted_kernels
