// Python's view of the staircase optimizers' planning code and of their kernels on host memory.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "host/host_optimizer.h"
#include "host/module.h"
#include "host/staircase_chunks.h"

namespace py = pybind11;

namespace sorted_kernels {
namespace {

using Integers = std::vector<int64_t>;
using Arrays = std::vector<py::array>;

py::array_t<int64_t> to_matrix(const Integers& values, int64_t cols) {
  py::array_t<int64_t> matrix({int64_t(values.size()) / cols, cols});
  std::copy(values.begin(), values.end(), matrix.mutable_data());
  return matrix;
}

py::array_t<int64_t> chunk_table(const std::vector<std::array<int64_t, 4>>& bands,
                                 const Integers& row_strides, int64_t chunk_elements) {
  std::vector<Band> list;
  for (const auto& band : bands) {
    list.push_back({band[0], band[1], band[2], band[3]});
  }
  Integers flat;
  for (const Chunk& chunk : chunk_staircases(list, row_strides, chunk_elements)) {
    flat.insert(flat.end(),
                {chunk.tensor, chunk.row_begin, chunk.rows, chunk.col_begin, chunk.cols});
  }
  return to_matrix(flat, 5);
}

DType dtype_of(const py::array& array, const std::string& half) {
  if (array.dtype().kind() == 'f' && array.itemsize() == 4) return DType::kFloat32;
  if (array.dtype().kind() == 'f' && array.itemsize() == 8) return DType::kFloat64;
  if (array.dtype().kind() == 'u' && array.itemsize() == 2) {
    if (half == "bfloat16") return DType::kBFloat16;
    if (half == "float16") return DType::kFloat16;
    throw std::invalid_argument("half='" + half + "'; allowed are bfloat16 and float16");
  }
  throw std::invalid_argument("arrays must be float32, float64, or uint16 holding half precision");
}

// NumPy counts strides in bytes.
OperandView view_of(py::array& array, const std::string& half) {
  Integers sizes, strides;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    sizes.push_back(array.shape(i));
    strides.push_back(array.strides(i) / array.itemsize());
  }
  return describe_operand("array", array.mutable_data(), array.ndim(), sizes.data(), strides.data(),
                          dtype_of(array, half));
}

OperandLists views_of(std::array<Arrays*, kOperands> lists, const std::string& half) {
  OperandLists views;
  for (int operand = 0; operand < kOperands; ++operand) {
    if (lists[operand] == nullptr) continue;
    for (py::array& array : *lists[operand]) {
      views[operand].push_back(view_of(array, half));
    }
  }
  return views;
}

void run_adamw(Arrays params, Arrays grads, Arrays exp_avgs, Arrays exp_avg_sqs, Arrays masters,
               const Integers& bands, const Integers& steps, double lr, double beta1, double beta2,
               double eps, double weight_decay, bool maximize, bool clear_grads,
               const std::string& half, const std::string& engine, int64_t chunk_elements,
               unsigned blocks, unsigned threads) {
  const AdamWOptions options{lr, beta1, beta2, eps, weight_decay, maximize, clear_grads};
  OptimizerPlan plan =
      plan_update(views_of({&params, &grads, &exp_avgs, &exp_avg_sqs, &masters}, half), bands, 2);
  set_bias_corrections(plan, steps, options);
  run_on_host(plan, options, {engine, chunk_elements, blocks, threads});
}

void run_sgd(Arrays params, Arrays grads, Arrays momentums, Arrays masters, const Integers& bands,
             double lr, double momentum, double weight_decay, bool nesterov, bool maximize,
             bool clear_grads, const std::string& half, const std::string& engine,
             int64_t chunk_elements, unsigned blocks, unsigned threads) {
  const SgdOptions options{lr, momentum, weight_decay, nesterov, maximize, clear_grads};
  const OptimizerPlan plan =
      plan_update(views_of({&params, &grads, &momentums, nullptr, &masters}, half), bands,
                  momentum != 0 ? 1 : 0);
  run_on_host(plan, options, {engine, chunk_elements, blocks, threads});
}

}  // namespace

void bind_optimizer(py::module_& module) {
  using namespace pybind11::literals;
  module.def("chunk_table", &chunk_table, "bands"_a, "row_strides"_a, "chunk_elements"_a,
             "Cut bands (tensor, row_begin, row_end, cols) into chunks; returns an int64 array of "
             "rows (tensor, row_begin, rows, col_begin, cols). row_strides[t] is 0 when tensor "
             "t's operands have different ones.");

  module.def(
      "run_adamw", &run_adamw, "params"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "masters"_a,
      "bands"_a, "steps"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "maximize"_a,
      "clear_grads"_a, "half"_a = "bfloat16", "engine"_a = "simt", "chunk_elements"_a = 4096,
      "blocks"_a = 3, "threads"_a = 32,
      "One AdamW step on NumPy arrays (uint16 holds half precision). Engine simt is the CUDA "
      "kernel's body on emulated threads; portable and avx2 are the CPU loops.");
  module.def("run_sgd", &run_sgd, "params"_a, "grads"_a, "momentums"_a, "masters"_a, "bands"_a,
             "lr"_a, "momentum"_a, "weight_decay"_a, "nesterov"_a, "maximize"_a, "clear_grads"_a,
             "half"_a = "bfloat16", "engine"_a = "simt", "chunk_elements"_a = 4096, "blocks"_a = 3,
             "threads"_a = 32, "One SGD step on NumPy arrays; see run_adamw.");
}

}  // namespace sorted_kernels
