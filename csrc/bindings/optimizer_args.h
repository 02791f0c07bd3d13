// The optimizer ops' arguments, read alike for the CPU and for CUDA.
#pragma once

#include "bindings/tensor_views.h"

namespace sorted_kernels {

// Device of the first parameter; every other tensor has to be there too.
struct DeviceId {
  int32_t type, index;
};
DeviceId device_of(const TensorList& params);

OptimizerPlan read_adamw(const TensorList& params, const TensorList& grads,
                         const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                         const TensorList& masters, const std::vector<int64_t>& bands,
                         const std::vector<int64_t>& steps, const AdamWOptions& options);

OptimizerPlan read_sgd(const TensorList& params, const TensorList& grads,
                       const TensorList& momentums, const TensorList& masters,
                       const std::vector<int64_t>& bands, const SgdOptions& options);

}  // namespace sorted_kernels
