// Splits the bands of staircases into chunks of about equal size.
#pragma once

#include <cstdint>
#include <vector>

#include "common/optimizer_table.h"

namespace sorted_kernels {

// Rows row_begin:row_end of one tensor, up to column cols.
struct Band {
  int64_t tensor;
  int64_t row_begin;
  int64_t row_end;
  int64_t cols;
};

// Row stride of a tensor whose operands do not all have the same one.
constexpr int64_t kDifferentStrides = 0;

// Cuts bands into chunks of at most `chunk_elements` elements, which together cover every element
// of the bands exactly once. `row_strides[t]` is the stride that all of tensor t's operands share,
// or kDifferentStrides. A band as wide as that stride lies in memory without gaps and is cut as
// one long row: such chunks have row_begin 0 and rows 1. Their cuts fall on multiples of
// `chunk_elements`, so that all but the first keep the alignment of the base pointer.
std::vector<Chunk> chunk_staircases(const std::vector<Band>& bands,
                                    const std::vector<int64_t>& row_strides,
                                    int64_t chunk_elements);

// Number of elements in the bands.
int64_t count_elements(const std::vector<Band>& bands);

}  // namespace sorted_kernels
