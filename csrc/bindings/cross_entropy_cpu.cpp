// CPU registrations of the cross-entropy's loops. The arguments are described in
// sorted_kernels/ops/compiled_cross_entropy.py.
#include "cpu/cross_entropy_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

namespace sorted_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 15;  // fewer elements than this are not worth a second thread
constexpr int64_t kRows = 32;        // what threads share out of a transposed sum, at least

void check(const char* name, const Tensor& tensor, int64_t axes) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == axes, name, " must be on the CPU with ", axes,
                  " axes");
}

void check_matrix(const char* name, const Tensor& tensor) {
  check(name, tensor, 2);
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, name,
                  " must have unit inner stride");
}

// A value for each row, side by side.
void check_of_rows(const char* name, const Tensor& tensor, ScalarType type, int64_t rows) {
  check(name, tensor, 1);
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.size(0) == rows && tensor.is_contiguous(),
                  name, " must be contiguous, of the right dtype, with ", rows, " elements");
}

template <typename Call>
void with_loops(const Tensor& tensor, const Call& call) {
  const AllCrossEntropyLoops& loops = cross_entropy_loops();
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return call(loops.of_float, static_cast<float*>(tensor.data_ptr()));
    case ScalarType::BFloat16:
      return call(loops.of_bfloat16, static_cast<BFloat16*>(tensor.data_ptr()));
    case ScalarType::Half:
      return call(loops.of_float16, static_cast<Float16*>(tensor.data_ptr()));
    default:
      STD_TORCH_CHECK(false, "only float32, bfloat16 and float16 have loops");
  }
}

void cross_entropy_rows(Tensor logits, Tensor target, std::optional<Tensor> scale,
                        int64_t ignore_index, double label_smoothing, bool gradient,
                        Tensor losses) {
  check_matrix("logits", logits);
  const int64_t rows = logits.size(0), words = logits.size(1);
  check_of_rows("target", target, ScalarType::Long, rows);
  check_of_rows("losses", losses, ScalarType::Float, rows);
  const float* scales = nullptr;
  if (scale.has_value()) {
    check_of_rows("scale", *scale, ScalarType::Float, rows);
    scales = static_cast<const float*>(scale->const_data_ptr());
  }
  const int64_t* targets = static_cast<const int64_t*>(target.const_data_ptr());
  for (const int64_t* word = targets; word != targets + rows; ++word) {
    STD_TORCH_CHECK(*word == ignore_index || (*word >= 0 && *word < words), "target has ", *word,
                    "; allowed are 0..", words - 1, " and ", ignore_index);
  }
  const CrossEntropyOptions options{words, logits.stride(0), ignore_index, label_smoothing,
                                    gradient};
  float* to = static_cast<float*>(losses.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, words));
  with_loops(logits, [&](const auto& loops, auto* data) {
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      loops.rows(data + begin * options.row_stride, targets + begin,
                 scales == nullptr ? nullptr : scales + begin, to + begin, end - begin, options);
    });
  });
}

void add_transposed(Tensor total, Tensor part, bool accumulate) {
  check_matrix("total", total);
  check_matrix("part", part);
  STD_TORCH_CHECK(total.scalar_type() == ScalarType::Float, "total must be float32");
  const int64_t rows = total.size(0), cols = total.size(1);
  STD_TORCH_CHECK(part.size(0) == cols && part.size(1) == rows,
                  "total and part must be (m, n) and (n, m)");
  float* to = static_cast<float*>(total.mutable_data_ptr());
  const int64_t stride = total.stride(0), part_stride = part.stride(0);
  const int64_t grain = std::max<int64_t>(1, kGrain / (kRows * std::max<int64_t>(1, cols)));
  with_loops(part, [&](const auto& loops, const auto* from) {
    torch::stable::parallel_for(
        0, (rows + kRows - 1) / kRows, grain, [&](int64_t begin, int64_t end) {
          const int64_t first = begin * kRows, last = std::min(rows, end * kRows);
          loops.add_transposed(to + first * stride, stride, from + first, part_stride, last - first,
                               cols, accumulate);
        });
  });
}

}  // namespace
}  // namespace sorted_kernels

STABLE_TORCH_LIBRARY_IMPL(sorted_kernels, CPU, library) {
  library.impl("cross_entropy_rows_", TORCH_BOX(&sorted_kernels::cross_entropy_rows));
  library.impl("add_transposed_", TORCH_BOX(&sorted_kernels::add_transposed));
}
