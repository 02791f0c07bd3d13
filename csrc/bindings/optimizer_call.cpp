#include "bindings/optimizer_call.h"

namespace sorted_kernels {
namespace {

using torch::stable::detail::to;

AdamWOptions read_adamw_options(const StableIValue* stack) {
  return {to<double>(stack[0]), to<double>(stack[1]), to<double>(stack[2]), to<double>(stack[3]),
          to<double>(stack[4]), to<bool>(stack[5]),   to<bool>(stack[6])};
}

SgdOptions read_sgd_options(const StableIValue* stack) {
  return {to<double>(stack[0]), to<double>(stack[1]), to<double>(stack[2]),
          to<bool>(stack[3]),   to<bool>(stack[4]),   to<bool>(stack[5])};
}

OptimizerPlan with_bias_corrections(OptimizerPlan plan, const std::vector<int64_t>& steps,
                                    const AdamWOptions& options) {
  set_bias_corrections(plan, steps, options);
  return plan;
}

}  // namespace

AdamWCall::AdamWCall(const StableIValue* stack)
    : params_(stack[0]),
      grads_(stack[1]),
      exp_avgs_(stack[2]),
      exp_avg_sqs_(stack[3]),
      masters_(stack[4]),
      bands_(take_integers(stack[5])),
      steps_(take_integers(stack[6])),
      options(read_adamw_options(stack + 7)),
      device(device_of("params", params_)),
      plan(with_bias_corrections(plan_update({describe_list("params", params_, device),
                                              describe_list("grads", grads_, device),
                                              describe_list("exp_avgs", exp_avgs_, device),
                                              describe_list("exp_avg_sqs", exp_avg_sqs_, device),
                                              describe_list("masters", masters_, device)},
                                             bands_, 2),
                                 steps_, options)) {}

SgdCall::SgdCall(const StableIValue* stack)
    : params_(stack[0]),
      grads_(stack[1]),
      momentums_(stack[2]),
      masters_(stack[3]),
      bands_(take_integers(stack[4])),
      options(read_sgd_options(stack + 5)),
      device(device_of("params", params_)),
      plan(plan_update({describe_list("params", params_, device),
                        describe_list("grads", grads_, device),
                        describe_list("momentums", momentums_, device),
                        {},
                        describe_list("masters", masters_, device)},
                       bands_, options.momentum != 0 ? 1 : 0)) {}

}  // namespace sorted_kernels
