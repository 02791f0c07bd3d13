// The step from torch's stable tensors to the planning code.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "host/optimizer_plan.h"

namespace sorted_kernels {

using TensorList = std::vector<torch::stable::Tensor>;

// Describes each tensor of a list, and checks that it is on `device_type` and, where there are
// several, on the device of index `device_index`.
std::vector<OperandView> describe_list(const char* name, const TensorList& tensors,
                                       int32_t device_type, int32_t device_index);

}  // namespace sorted_kernels
