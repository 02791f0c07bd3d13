// CPU registration of the ragged products in float32. The arguments are described in
// sorted_kernels/ops/ragged_products.py.
//
// Each thread takes whole jobs and has torch's own GEMM work through a job's boxes. A GEMM inside a
// parallel region has one thread, which suits boxes: shared among threads, thin ones leave most of
// them waiting. Every output is written by one job, in one order, so a product gives the same
// result each time.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "host/ragged_boxes.h"

namespace sorted_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A float32 matrix in somebody else's memory; unit stride along columns.
struct Matrix {
  float* data;
  int64_t stride;
};

// A block of a matrix, or its transpose, as a tensor of torch's. It is made from an address, and
// not as a view: on other threads than the caller's, views would be recorded for autograd.
class Block {
 public:
  Block(Matrix matrix, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
        bool transposed = false) {
    int64_t sizes[] = {row_end - row_begin, col_end - col_begin};
    int64_t strides[] = {matrix.stride, 1};
    if (transposed) {
      std::swap(sizes[0], sizes[1]);
      std::swap(strides[0], strides[1]);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        matrix.data + row_begin * matrix.stride + col_begin, 2, sizes, strides, 0,
        aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle_));
  }
  ~Block() { aoti_torch_delete_tensor_object(handle_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  AtenTensorHandle handle() const { return handle_; }

 private:
  AtenTensorHandle handle_;
};

// out = beta * out + a b
void multiply(const Block& out, const Block& a, const Block& b, double beta) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.handle(), out.handle(), a.handle(), b.handle(), beta, 1));
}

struct Product {
  GemmMode mode;
  std::vector<RowRun> runs;
  Matrix a, b, out;
  const float* bias;
  bool accumulate;
};

// The job's outputs before anything is added: the bias, and zero past each row's size.
void fill(const Product& p, const RaggedJob& job) {
  float* row = p.out.data;
  for (const RowRun& run : p.runs) {
    const int64_t size = p.mode == GemmMode::kForward ? run.m : run.k;
    const int64_t end = p.bias == nullptr ? job.begin : std::clamp(size, job.begin, job.end);
    for (int64_t i = 0; i < run.rows; ++i, row += p.out.stride) {
      if (end > job.begin) std::copy(p.bias + job.begin, p.bias + end, row + job.begin);
      std::fill(row + end, row + job.end, 0.0f);
    }
  }
}

void run(const Product& p, const RaggedJob& job) {
  if (p.mode != GemmMode::kWgrad) fill(p, job);
  for (const RaggedBox& box : job.boxes) {
    const auto [rows, m0, m1, k0, k1] = box;
    if (p.mode == GemmMode::kForward) {
      multiply({p.out, 0, rows, m0, m1}, {p.a, 0, rows, k0, k1}, {p.b, m0, m1, k0, k1, true}, 1);
    } else if (p.mode == GemmMode::kDgrad) {
      multiply({p.out, 0, rows, k0, k1}, {p.a, 0, rows, m0, m1}, {p.b, m0, m1, k0, k1}, 1);
    } else {
      multiply({p.out, m0, m1, k0, k1}, {p.a, 0, rows, m0, m1, true}, {p.b, 0, rows, k0, k1},
               p.accumulate ? 1 : 0);
    }
  }
}

Matrix matrix_of(const char* name, const Tensor& tensor, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_cpu(), name,
                  " must be float32 on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) >= rows && tensor.size(1) >= cols, name,
                  " must have at least ", rows, " rows and ", cols, " columns");
  STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, name,
                  " must have unit inner stride");
  return {static_cast<float*>(const_cast<void*>(tensor.const_data_ptr())), tensor.stride(0)};
}

std::vector<RowRun> runs_of(const std::vector<int64_t>& flat) {
  STD_TORCH_CHECK(flat.size() % 3 == 0, "runs has ", flat.size(), " integers; they are triples");
  std::vector<RowRun> runs;
  for (size_t i = 0; i < flat.size(); i += 3) {
    runs.push_back({flat[i], flat[i + 1], flat[i + 2]});
  }
  return runs;
}

void ragged_product(int64_t mode_number, Tensor a, Tensor b, std::optional<Tensor> bias,
                    std::vector<int64_t> flat_runs, Tensor out, bool accumulate) {
  STD_TORCH_CHECK(mode_number >= 0 && mode_number <= 2, "mode must be 0, 1 or 2");
  Product p{GemmMode(mode_number), runs_of(flat_runs)};
  const std::vector<RaggedJob> jobs = ragged_jobs(p.mode, p.runs, torch::stable::get_num_threads());
  int64_t rows = 0;
  for (const RowRun& run : p.runs) rows += run.rows;
  const int64_t m = p.runs[0].m, k = p.runs[0].k;
  const bool forward = p.mode == GemmMode::kForward, wgrad = p.mode == GemmMode::kWgrad;
  p.a = matrix_of("a", a, rows, forward ? k : m);
  p.b = matrix_of("b", b, wgrad ? rows : m, k);
  p.out = matrix_of("out", out, wgrad ? m : rows, forward ? m : k);
  p.bias = nullptr;
  p.accumulate = accumulate;
  if (bias.has_value()) {
    STD_TORCH_CHECK(forward && bias->dim() == 1 && bias->size(0) >= m && bias->is_contiguous() &&
                        bias->scalar_type() == ScalarType::Float && bias->is_cpu(),
                    "bias must be a float32 vector of at least ", m, " elements, for forward");
    p.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  const int64_t count = jobs.size();
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) run(p, jobs[i]);
  });
}

}  // namespace
}  // namespace sorted_kernels

STABLE_TORCH_LIBRARY_IMPL(sorted_kernels, CPU, library) {
  library.impl("ragged_product_", TORCH_BOX(&sorted_kernels::ragged_product));
}
