// Lists as torch's stable ABI hands them to a boxed kernel. A list on the stack, and every tensor
// handle in it, belongs to whoever takes it. Converting them to std::vector<torch::stable::Tensor>
// would allocate for every tensor, and an optimizer step passes hundreds.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "host/optimizer_plan.h"

namespace sorted_kernels {

std::vector<int64_t> take_integers(StableIValue list);

// Owns the tensors of a list that was taken from the stack.
class TensorList {
 public:
  explicit TensorList(StableIValue list);
  ~TensorList();
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  const std::vector<AtenTensorHandle>& handles() const { return handles_; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

struct DeviceId {
  int32_t type, index;
};

// Device of a list's first tensor; throws when the list is empty.
DeviceId device_of(const char* name, const TensorList& tensors);

// Describes each tensor of a list; throws unless all of them are on `device`.
std::vector<OperandView> describe_list(const char* name, const TensorList& tensors,
                                       DeviceId device);

}  // namespace sorted_kernels
