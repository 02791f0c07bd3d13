// Python's view of the GEMM's planning code, and of its kernel on host memory.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "host/gemm_schedule.h"
#include "host/host_gemm.h"
#include "host/module.h"
#include "host/ragged_boxes.h"

namespace py = pybind11;

namespace sorted_kernels {
namespace {

using Runs = std::vector<std::array<int64_t, 3>>;

GemmMode mode_of(const std::string& name) {
  if (name == "forward") return GemmMode::kForward;
  if (name == "dgrad") return GemmMode::kDgrad;
  if (name == "wgrad") return GemmMode::kWgrad;
  throw std::invalid_argument("mode='" + name + "'; allowed are forward, dgrad and wgrad");
}

std::vector<RowRun> runs_of(const Runs& runs) {
  std::vector<RowRun> list;
  for (const auto& run : runs) list.push_back({run[0], run[1], run[2]});
  return list;
}

GemmSchedule schedule(const std::string& mode, const Runs& runs, const TileChoice& choice) {
  return schedule_gemm(mode_of(mode), runs_of(runs), choice);
}

using Box = std::array<int64_t, 5>;
using Job = std::tuple<int64_t, int64_t, std::vector<Box>>;

std::vector<Job> jobs(const std::string& mode, const Runs& runs, int64_t threads) {
  std::vector<Job> list;
  for (const RaggedJob& job : ragged_jobs(mode_of(mode), runs_of(runs), threads)) {
    std::vector<Box> boxes;
    for (const RaggedBox& b : job.boxes) {
      boxes.push_back({b.rows, b.m_begin, b.m_end, b.k_begin, b.k_end});
    }
    list.emplace_back(job.begin, job.end, boxes);
  }
  return list;
}

// Plain structs of 32-bit integers, as a matrix with a row each.
template <typename Record>
py::array_t<int32_t> to_matrix(const std::vector<Record>& records) {
  constexpr py::ssize_t kFields = sizeof(Record) / sizeof(int32_t);
  py::array_t<int32_t> matrix({py::ssize_t(records.size()), kFields});
  const auto* begin = reinterpret_cast<const int32_t*>(records.data());
  std::copy(begin, begin + records.size() * kFields, matrix.mutable_data());
  return matrix;
}

GemmOperand operand_of(const py::array_t<uint16_t>& array) {
  return {array.data(), array.shape(1), array.shape(0), array.strides(0) / 2};
}

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"none", "relu", "gelu", "silu"};
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  if (found == std::end(kNames)) {
    throw std::invalid_argument("activation='" + name + "'; allowed are none, relu, gelu, silu");
  }
  return Activation(found - kNames);
}

void run_gemm(const std::string& mode, const py::array_t<uint16_t>& a,
              const py::array_t<uint16_t>& b, py::array& out, const Runs& runs,
              const TileChoice& choice, const std::string& half, const py::object& bias,
              const std::string& activation, const py::object& saved, bool accumulate,
              const py::object& sizes, int blocks, uint64_t seed) {
  const GemmSchedule plan = schedule(mode, runs, choice);
  const bool ragged = plan.runs.size() > 1, wide = out.itemsize() == 4;
  const DType dtype = half == "bfloat16" ? DType::kBFloat16 : DType::kFloat16;
  const int64_t stride = out.strides(0) / out.itemsize();
  std::vector<float> workspace(int64_t(plan.slots) * choice.tile_m * choice.tile_n);
  std::vector<int32_t> counters(plan.slots);
  GemmParams params{};
  params.grid = grid_of(plan);
  params.count = int32_t(plan.tiles.size());
  if (ragged) {
    params.tiles = plan.tiles.data();
    params.runs = plan.runs.data();
    params.run_count = int32_t(plan.runs.size());
  }
  py::array_t<int32_t> known;
  if (!sizes.is_none()) {
    known = sizes.cast<py::array_t<int32_t>>();
    params.sizes = known.data();
  }
  params.out = out.mutable_data();
  params.out_stride = stride;
  params.out_cols = int32_t(out.shape(1));
  params.out_vector =
      reinterpret_cast<uintptr_t>(params.out) % 16 == 0 && stride * out.itemsize() % 16 == 0;
  params.accumulate = accumulate;
  if (!saved.is_none()) {
    auto array = saved.cast<py::array>();
    params.saved = array.mutable_data();
    params.saved_stride = array.strides(0) / array.itemsize();
  }
  if (!bias.is_none()) params.bias = bias.cast<py::array>().data();
  params.activation = activation_of(activation);
  params.workspace = workspace.data();
  params.counters = counters.data();
  run_gemm_on_host({mode_of(mode), dtype, wide ? DType::kFloat32 : dtype, operand_of(a),
                    operand_of(b), params, blocks, plan.slots, 0, nullptr},
                   seed);
}

}  // namespace

void bind_gemm(py::module_& module) {
  using namespace pybind11::literals;
  py::class_<TileChoice>(module, "TileChoice")
      .def(py::init<int32_t, int32_t, int32_t, int32_t>(), "tile_m"_a, "tile_n"_a, "tile_k"_a,
           "split_k"_a = 1)
      .def_readonly("tile_m", &TileChoice::tile_m)
      .def_readonly("tile_n", &TileChoice::tile_n)
      .def_readonly("tile_k", &TileChoice::tile_k)
      .def_readonly("split_k", &TileChoice::split_k)
      .def("__repr__", &TileChoice::to_string);
  py::class_<GemmSchedule>(module, "GemmSchedule")
      .def_property_readonly(
          "tiles", [](const GemmSchedule& s) { return to_matrix(s.tiles); },
          "int32 array of tiles in launch order: row_begin, row_end, col_begin, col_end, "
          "red_begin, "
          "red_end, clip_from, part, parts, slot.")
      .def_property_readonly(
          "runs", [](const GemmSchedule& s) { return to_matrix(s.runs); },
          "int32 array of runs as the kernel reads them: row_end and two sizes.")
      .def_readonly("choice", &GemmSchedule::choice)
      .def_readonly("slots", &GemmSchedule::slots)
      .def_readonly("flops", &GemmSchedule::flops)
      .def("__str__", &format_schedule);
  module.attr("NO_CLIP") = kNoClip;
  module.def(
      "choose_tiles",
      [](const std::string& mode, const Runs& runs, int32_t processors) {
        return choose_tiles(mode_of(mode), runs_of(runs), processors);
      },
      "mode"_a, "runs"_a, "processors"_a,
      "Tile sizes and split-K of a product of (rows, m, k) runs; mode is forward, dgrad or wgrad.");
  module.def("schedule_gemm", &schedule, "mode"_a, "runs"_a, "choice"_a,
             "The tiles of a product of (rows, m, k) runs, sorted largest first.");
  module.def("ragged_jobs", &jobs, "mode"_a, "runs"_a, "threads"_a,
             "A ragged product on the CPU as jobs (begin, end, boxes): the outputs that a job "
             "writes, and its boxes (rows, m_begin, m_end, k_begin, k_end).");
  module.def(
      "run_gemm", &run_gemm, "mode"_a, "a"_a.noconvert(), "b"_a.noconvert(), "out"_a, "runs"_a,
      "choice"_a, "half"_a = "bfloat16", "bias"_a = py::none(), "activation"_a = "none",
      "saved"_a = py::none(), "accumulate"_a = false, "sizes"_a = py::none(), "blocks"_a = 2,
      "seed"_a = 0,
      "Run the CUDA GEMM's device code on emulated threads. Operands are uint16 arrays that hold "
      "half precision, as the kernel reads them (forward x and W, dgrad dy and W, wgrad dy and x), "
      "and their shapes are the extents. `out` is uint16 or, for wgrad, float32. `sizes` holds "
      "rows, columns and reduction where the kernel is to read them from memory.");
}

}  // namespace sorted_kernels
