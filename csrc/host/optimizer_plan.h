// From lists of tensors and bands to the tables that an optimizer kernel reads. Knows neither torch
// nor NumPy: both front ends describe their tensors as OperandView.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/optimizer_table.h"
#include "host/staircase_chunks.h"

namespace sorted_kernels {

// A matrix with unit inner stride. One-dimensional tensors are a column: cols 1, and the tensor's
// own stride between rows.
struct OperandView {
  void* data;
  int64_t rows, cols, row_stride;
  DType dtype;
};

// Describes a tensor; throws std::invalid_argument unless it has one or two dimensions and a unit
// inner stride.
OperandView describe_operand(const char* name, void* data, int64_t dims, const int64_t* sizes,
                             const int64_t* strides, DType dtype);

// The tensor lists of a call, indexed by Operand; lists that the update does not use are empty.
using OperandLists = std::array<std::vector<OperandView>, kOperands>;

struct OptimizerPlan {
  std::vector<TensorRecord> tensors;
  std::vector<int64_t> row_strides;
  std::vector<Band> bands;
  UpdateTypes types;

  std::vector<Chunk> chunks(int64_t chunk_elements) const {
    return chunk_staircases(bands, row_strides, chunk_elements);
  }
};

// Checks the lists against one another and builds the plan. `flat_bands` holds quadruples (tensor,
// row_begin, row_end, cols). `states` is the number of state lists that the optimizer needs.
OptimizerPlan plan_update(const OperandLists& lists, const std::vector<int64_t>& flat_bands,
                          int states);

// Adds AdamW's bias corrections; steps[t] counts tensor t's updates, this one included.
void set_bias_corrections(OptimizerPlan& plan, const std::vector<int64_t>& steps,
                          const AdamWOptions& options);

}  // namespace sorted_kernels
