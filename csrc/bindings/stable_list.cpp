#include "bindings/stable_list.h"

namespace sorted_kernels {
namespace {

using torch::stable::detail::to;

// Moves the elements of a list out of it, and frees the list.
template <typename T>
std::vector<T> take_elements(StableIValue list) {
  const StableListHandle handle = to<StableListHandle>(list);
  size_t size = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(handle, &size));
  std::vector<T> elements(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element{};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle, i, &element));
    elements[i] = to<T>(element);
  }
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(handle));
  return elements;
}

DeviceId device_of(AtenTensorHandle tensor) {
  DeviceId device{};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &device.index));
  return device;
}

DType dtype_of(const char* name, AtenTensorHandle tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return DType::kFloat64;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), name,
                  " must be float32, float64, bfloat16 or float16");
  return DType::kFloat16;
}

OperandView describe(const char* name, AtenTensorHandle tensor) {
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dims));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &data));
  return describe_operand(name, data, dims, sizes, strides, dtype_of(name, tensor));
}

}  // namespace

std::vector<int64_t> take_integers(StableIValue list) { return take_elements<int64_t>(list); }

TensorList::TensorList(StableIValue list) : handles_(take_elements<AtenTensorHandle>(list)) {}

TensorList::~TensorList() {
  for (AtenTensorHandle handle : handles_) {
    aoti_torch_delete_tensor_object(handle);
  }
}

DeviceId device_of(const char* name, const TensorList& tensors) {
  STD_TORCH_CHECK(!tensors.handles().empty(), name, " is empty");
  return device_of(tensors.handles()[0]);
}

std::vector<OperandView> describe_list(const char* name, const TensorList& tensors,
                                       DeviceId device) {
  std::vector<OperandView> views;
  views.reserve(tensors.handles().size());
  for (AtenTensorHandle tensor : tensors.handles()) {
    const DeviceId own = device_of(tensor);
    STD_TORCH_CHECK(own.type == device.type && own.index == device.index, name, "[", views.size(),
                    "] is not on the device of the first parameter");
    views.push_back(describe(name, tensor));
  }
  return views;
}

}  // namespace sorted_kernels
