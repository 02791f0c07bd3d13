#include "host/optimizer_plan.h"

#include <cmath>
#include <stdexcept>

namespace sorted_kernels {
namespace {

constexpr const char* kNames[kOperands] = {"params", "grads", "first states", "second states",
                                           "masters"};

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

const char* name_of(DType dtype) {
  constexpr const char* kDTypeNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kDTypeNames[int(dtype)];
}

bool is_half(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

std::string item(int operand, size_t index) {
  return std::string(kNames[operand]) + "[" + std::to_string(index) + "]";
}

void check_length(const OperandLists& lists, int operand, size_t expected) {
  if (lists[operand].size() != expected) {
    fail(std::string(kNames[operand]) + " has " + std::to_string(lists[operand].size()) +
         " tensors; " + std::to_string(expected) + " are needed");
  }
}

void check_list(const OperandLists& lists, int operand, DType dtype) {
  const auto& params = lists[kParam];
  for (size_t i = 0; i < lists[operand].size(); ++i) {
    const OperandView& view = lists[operand][i];
    if (view.rows != params[i].rows || view.cols != params[i].cols) {
      fail(item(operand, i) + " is " + std::to_string(view.rows) + "x" + std::to_string(view.cols) +
           ", its parameter " + std::to_string(params[i].rows) + "x" +
           std::to_string(params[i].cols));
    }
    if (view.dtype != dtype) {
      fail(item(operand, i) + " is " + name_of(view.dtype) + "; " + name_of(dtype) + " is needed");
    }
  }
}

UpdateTypes check_lists(const OperandLists& lists, int states) {
  const size_t count = lists[kParam].size();
  const UpdateTypes types{lists[kParam][0].dtype,
                          lists[kGrad].empty() ? DType::kFloat32 : lists[kGrad][0].dtype};
  const bool half = is_half(types.param);
  const DType compute = half ? DType::kFloat32 : types.param;
  check_length(lists, kGrad, count);
  check_length(lists, kState, states > 0 ? count : 0);
  check_length(lists, kSecondState, states > 1 ? count : 0);
  check_length(lists, kMaster, half ? count : 0);
  if (types.grad != types.param && types.grad != compute) {
    fail(item(kGrad, 0) + " is " + name_of(types.grad) + "; for " + name_of(types.param) +
         " parameters it can be " + name_of(types.param) + (half ? " or float32" : ""));
  }
  check_list(lists, kParam, types.param);
  check_list(lists, kGrad, types.grad);
  for (int operand = kState; operand < kOperands; ++operand) {
    check_list(lists, operand, compute);
  }
  return types;
}

std::vector<Band> read_bands(const std::vector<int64_t>& flat,
                             const std::vector<OperandView>& params) {
  if (flat.size() % 4 != 0) {
    fail("bands has " + std::to_string(flat.size()) +
         " numbers; it must hold quadruples (tensor, row_begin, row_end, cols)");
  }
  std::vector<Band> bands;
  bands.reserve(flat.size() / 4);
  for (size_t i = 0; i < flat.size(); i += 4) {
    const Band band{flat[i], flat[i + 1], flat[i + 2], flat[i + 3]};
    const bool known = band.tensor >= 0 && band.tensor < int64_t(params.size());
    if (!known || band.row_begin < 0 || band.row_begin > band.row_end || band.cols < 0 ||
        band.row_end > params[band.tensor].rows || band.cols > params[band.tensor].cols) {
      fail("band (" + std::to_string(band.tensor) + ", " + std::to_string(band.row_begin) + ", " +
           std::to_string(band.row_end) + ", " + std::to_string(band.cols) +
           ") lies outside its tensor" +
           (known ? ", which is " + std::to_string(params[band.tensor].rows) + "x" +
                        std::to_string(params[band.tensor].cols)
                  : "; there are " + std::to_string(params.size()) + " tensors"));
    }
    bands.push_back(band);
  }
  return bands;
}

int64_t shared_stride(const OperandLists& lists, size_t index) {
  const int64_t stride = lists[kParam][index].row_stride;
  for (const auto& list : lists) {
    if (!list.empty() && list[index].row_stride != stride) {
      return kDifferentStrides;
    }
  }
  return stride;
}

}  // namespace

OperandView describe_operand(const char* name, void* data, int64_t dims, const int64_t* sizes,
                             const int64_t* strides, DType dtype) {
  if (dims == 1) {
    return {data, sizes[0], 1, strides[0], dtype};
  }
  if (dims != 2) {
    fail(std::string(name) + " has " + std::to_string(dims) + " dimensions; 1 or 2 are allowed");
  }
  if (sizes[1] > 1 && strides[1] != 1) {
    fail(std::string(name) + " has inner stride " + std::to_string(strides[1]) + "; it must be 1");
  }
  return {data, sizes[0], sizes[1], strides[0], dtype};
}

OptimizerPlan plan_update(const OperandLists& lists, const std::vector<int64_t>& flat_bands,
                          int states) {
  OptimizerPlan plan{};
  if (!lists[kParam].empty()) {
    plan.types = check_lists(lists, states);
  }
  plan.bands = read_bands(flat_bands, lists[kParam]);
  plan.tensors.resize(lists[kParam].size());
  plan.row_strides.resize(lists[kParam].size());
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    plan.row_strides[i] = shared_stride(lists, i);
    for (int operand = 0; operand < kOperands; ++operand) {
      if (!lists[operand].empty()) {
        plan.tensors[i].data[operand] = lists[operand][i].data;
        plan.tensors[i].row_stride[operand] = lists[operand][i].row_stride;
      }
    }
  }
  return plan;
}

void set_bias_corrections(OptimizerPlan& plan, const std::vector<int64_t>& steps,
                          const AdamWOptions& options) {
  if (steps.size() != plan.tensors.size()) {
    fail("steps has " + std::to_string(steps.size()) + " entries for " +
         std::to_string(plan.tensors.size()) + " parameters");
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i] < 1) {
      fail("steps[" + std::to_string(i) + "]=" + std::to_string(steps[i]) +
           " must be at least 1: it counts this update");
    }
    if (i > 0 && steps[i] == steps[i - 1]) {  // most parameters have moved equally often
      plan.tensors[i].step_size = plan.tensors[i - 1].step_size;
      plan.tensors[i].inv_sqrt_bias2 = plan.tensors[i - 1].inv_sqrt_bias2;
      continue;
    }
    const double step = double(steps[i]);
    plan.tensors[i].step_size = options.lr / (1 - std::pow(options.beta1, step));
    plan.tensors[i].inv_sqrt_bias2 = 1 / std::sqrt(1 - std::pow(options.beta2, step));
  }
}

}  // namespace sorted_kernels
