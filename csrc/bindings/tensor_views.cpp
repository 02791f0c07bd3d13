#include "bindings/tensor_views.h"

namespace sorted_kernels {
namespace {

DType dtype_of(const char* name, AtenTensorHandle tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return DType::kFloat64;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
}

OperandView describe(const char* name, AtenTensorHandle tensor, int32_t device_type,
                     int32_t device_index) {
  int32_t type = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  STD_TORCH_CHECK(type == device_type && index == device_index, name,
                  " are not all on the device of the first parameter");
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dims));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &data));
  return describe_operand(name, data, dims, sizes, strides, dtype_of(name, tensor));
}

}  // namespace

std::vector<OperandView> describe_list(const char* name, const TensorList& tensors,
                                       int32_t device_type, int32_t device_index) {
  std::vector<OperandView> views;
  views.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    views.push_back(describe(name, tensor.get(), device_type, device_index));
  }
  return views;
}

}  // namespace sorted_kernels
