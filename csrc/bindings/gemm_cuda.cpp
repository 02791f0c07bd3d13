// CUDA registration of the GEMM kernel, under a private name: Python decides when it is used, plans
// its tiles and allocates what it writes. The arguments are described in
// sorted_kernels/ops/gemm.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "bindings/cuda_stream.h"
#include "kernels/gemm_launch.h"

namespace sorted_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool aligned(const void* data, int64_t rows, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows == 1 || stride * bytes % 16 == 0);
}

void check_matrix(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) == 1 || tensor.stride(1) == 1), name,
                  " must have two axes and unit inner stride");
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), name,
                  " must be on the device of a");
}

DType dtype_of(const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Float) return DType::kFloat32;
  if (tensor.scalar_type() == ScalarType::Half) return DType::kFloat16;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, name,
                  " must be bfloat16 or float16, or float32 for a gradient");
  return DType::kBFloat16;
}

GemmOperand operand_of(const char* name, const Tensor& tensor) {
  const int64_t inner = tensor.size(1), outer = tensor.size(0);
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(aligned(data, outer, tensor.stride(0), 2), name,
                  " must have its address and row stride at multiples of 16 bytes");
  return {data, inner, outer, outer == 1 ? (inner + 7) / 8 * 8 : tensor.stride(0)};
}

const int32_t* table_of(const char* name, const std::optional<Tensor>& tensor, int64_t cols) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Int && tensor->is_contiguous() &&
                      tensor->dim() >= 1 && tensor->size(tensor->dim() - 1) == cols,
                  name, " must be a contiguous int32 table with ", cols, " columns");
  return static_cast<const int32_t*>(tensor->const_data_ptr());
}

GemmGrid grid_of(GemmMode mode, const Tensor& a, const Tensor& b, int64_t tile_cols,
                 int64_t split) {
  const int a_red = mode == GemmMode::kWgrad ? 0 : 1, b_red = mode == GemmMode::kForward ? 1 : 0;
  STD_TORCH_CHECK(a.size(a_red) == b.size(b_red), "a and b must have the same reduction, got ",
                  a.size(a_red), " and ", b.size(b_red));
  STD_TORCH_CHECK(std::min({a.numel(), b.numel()}) > 0, "a and b must not be empty");
  STD_TORCH_CHECK(tile_cols == 128 || tile_cols == 256, "tile_cols must be 128 or 256");
  STD_TORCH_CHECK(split >= 1 && split <= 1024, "split must be between 1 and 1024");
  return {int32_t(a.size(1 - a_red)),
          int32_t(b.size(1 - b_red)),
          int32_t(a.size(a_red)),
          kGemmTileRows,
          int32_t(tile_cols),
          kGemmTileRed,
          int32_t(split)};
}

Tensor allocate(int64_t bytes, int32_t device) {
  return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CUDA, device),
                              std::nullopt);
}

void native_gemm(int64_t mode_number, Tensor a, Tensor b, std::optional<Tensor> bias, Tensor out,
                 std::optional<Tensor> saved, std::optional<Tensor> tiles,
                 std::optional<Tensor> runs, std::optional<Tensor> sizes, int64_t tile_cols,
                 int64_t split, int64_t slots, int64_t activation, bool accumulate) {
  STD_TORCH_CHECK(mode_number >= 0 && mode_number <= 2, "mode must be 0, 1 or 2");
  STD_TORCH_CHECK(activation >= 0 && activation <= 3, "activation must be between 0 and 3");
  STD_TORCH_CHECK(tiles.has_value() == runs.has_value(), "tiles and runs go together");
  const auto mode = GemmMode(mode_number);
  const int32_t device = a.get_device_index();
  check_matrix("a", a, a);
  check_matrix("b", b, a);
  check_matrix("out", out, a);
  GemmLaunch launch{mode, dtype_of("a", a), dtype_of("out", out)};
  STD_TORCH_CHECK(launch.dtype != DType::kFloat32 && dtype_of("b", b) == launch.dtype &&
                      (launch.out_dtype == launch.dtype ||
                       (mode == GemmMode::kWgrad && launch.out_dtype == DType::kFloat32)),
                  "a and b must have one dtype of bfloat16 and float16, and out the same; a "
                  "gradient of the weight may be float32");
  launch.a = operand_of("a", a);
  launch.b = operand_of("b", b);
  GemmParams& p = launch.params;
  p.grid = grid_of(mode, a, b, tile_cols, split);
  STD_TORCH_CHECK(out.size(0) == p.grid.rows && out.size(1) >= p.grid.cols &&
                      (mode != GemmMode::kWgrad || out.size(1) == p.grid.cols),
                  "out must have ", p.grid.rows, " rows and ", p.grid.cols, " columns");
  p.tiles = reinterpret_cast<const GemmTile*>(
      table_of("tiles", tiles, sizeof(GemmTile) / sizeof(int32_t)));
  p.runs =
      reinterpret_cast<const GemmRun*>(table_of("runs", runs, sizeof(GemmRun) / sizeof(int32_t)));
  p.sizes = table_of("sizes", sizes, 3);
  p.count = tiles.has_value() ? int32_t(tiles->size(0)) : tile_count(p.grid);
  p.run_count = runs.has_value() ? int32_t(runs->size(0)) : 0;
  STD_TORCH_CHECK(p.sizes == nullptr || (p.tiles == nullptr && split == 1),
                  "sizes in device memory go with neither a table of tiles nor a cut reduction");
  if (p.tiles == nullptr) {
    const bool cut = part_length(p.grid.red, kGemmTileRed, p.grid.split) < p.grid.red;
    slots = cut ? p.count : 0;
  }
  p.out = out.mutable_data_ptr();
  p.out_stride = out.stride(0);
  p.out_cols = int32_t(out.size(1));
  p.out_vector = aligned(p.out, out.size(0), out.stride(0), out.element_size());
  p.accumulate = accumulate;
  if (saved.has_value()) {
    check_matrix("saved", *saved, a);
    STD_TORCH_CHECK(saved->scalar_type() == out.scalar_type() && saved->size(0) == out.size(0) &&
                        saved->size(1) == out.size(1),
                    "saved must be like out");
    p.saved = saved->mutable_data_ptr();
    p.saved_stride = saved->stride(0);
    p.out_vector &= aligned(p.saved, out.size(0), p.saved_stride, out.element_size());
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) >= p.grid.cols && bias->is_contiguous() &&
                        bias->scalar_type() == a.scalar_type() &&
                        bias->get_device_index() == device,
                    "bias must be a vector of ", p.grid.cols, " elements or more, like a");
    p.bias = bias->const_data_ptr();
  }
  p.activation = Activation(activation);

  const torch::stable::accelerator::DeviceGuard guard(device);
  launch.blocks = gemm_blocks(p, device);
  launch.slots = int(slots);
  launch.device = device;
  launch.stream = current_stream(device);
  // Torch reuses freed memory in the order of the stream, so both may go when this returns.
  const int64_t part_bytes = kGemmTileRows * tile_cols * int64_t(sizeof(float));
  const int64_t map_bytes = p.sizes != nullptr ? 2 * kTensorMapBytes * launch.blocks : 0;
  Tensor scratch = allocate(map_bytes + slots * (part_bytes + int64_t(sizeof(int32_t))), device);
  char* place = static_cast<char*>(scratch.mutable_data_ptr());
  p.maps = place;
  p.workspace = reinterpret_cast<float*>(place + map_bytes);
  p.counters = reinterpret_cast<int32_t*>(place + map_bytes + slots * part_bytes);
  const char* error = launch_gemm(launch);
  STD_TORCH_CHECK(error == nullptr, "GEMM kernel: ", error);
}

}  // namespace
}  // namespace sorted_kernels

STABLE_TORCH_LIBRARY_IMPL(sorted_kernels, CUDA, library) {
  library.impl("native_gemm", TORCH_BOX(&sorted_kernels::native_gemm));
}
