#include "bindings/optimizer_args.h"

namespace sorted_kernels {

DeviceId device_of(const TensorList& params) {
  STD_TORCH_CHECK(!params.empty(), "params is empty");
  DeviceId device{};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(params[0].get(), &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(params[0].get(), &device.index));
  return device;
}

OptimizerPlan read_adamw(const TensorList& params, const TensorList& grads,
                         const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                         const TensorList& masters, const std::vector<int64_t>& bands,
                         const std::vector<int64_t>& steps, const AdamWOptions& options) {
  const DeviceId device = device_of(params);
  const auto describe = [&](const char* name, const TensorList& tensors) {
    return describe_list(name, tensors, device.type, device.index);
  };
  OptimizerPlan plan = plan_update(
      {describe("params", params), describe("grads", grads), describe("exp_avgs", exp_avgs),
       describe("exp_avg_sqs", exp_avg_sqs), describe("masters", masters)},
      bands, 2);
  set_bias_corrections(plan, steps, options);
  return plan;
}

OptimizerPlan read_sgd(const TensorList& params, const TensorList& grads,
                       const TensorList& momentums, const TensorList& masters,
                       const std::vector<int64_t>& bands, const SgdOptions& options) {
  const DeviceId device = device_of(params);
  const auto describe = [&](const char* name, const TensorList& tensors) {
    return describe_list(name, tensors, device.type, device.index);
  };
  return plan_update({describe("params", params),
                      describe("grads", grads),
                      describe("momentums", momentums),
                      {},
                      describe("masters", masters)},
                     bands, options.momentum != 0 ? 1 : 0);
}

}  // namespace sorted_kernels
