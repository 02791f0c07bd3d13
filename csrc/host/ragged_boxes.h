// How a ragged product is done by ordinary GEMMs on the CPU: each of some jobs is a list of boxes
// of the weight and of the rows that use them. No box holds an element that its rows do not use,
// and together they are all of the work, so the FLOPs are exactly those of the rows.
//
// Runs are sorted, largest first in both sizes, so the rows that use an element of the weight are
// the first of the batch. From one run to the next smaller one the used block shrinks by an
// L-shaped frame, whose elements all have the same rows: two boxes. The frames are cut again: into
// jobs, so that each output belongs to one job; and into bands of weight rows, so that the narrow
// leg of a frame meets the pages of memory that the leg before it has met. Without bands, each of
// a dozen legs would look up every page of the weight anew.
#pragma once

#include <cstdint>
#include <vector>

#include "host/gemm_schedule.h"

namespace sorted_kernels {

// weight[m_begin:m_end, k_begin:k_end], used by the batch's first `rows` rows.
struct RaggedBox {
  int64_t rows, m_begin, m_end, k_begin, k_end;
};

// The boxes that write the outputs [begin, end): columns of y (forward), columns of dx (dgrad), or
// rows of the weight's gradient (wgrad). They may share outputs, and have to run in order.
struct RaggedJob {
  int64_t begin, end;
  std::vector<RaggedBox> boxes;
};

// Jobs of about equal time: a few for each of `threads`, fewer where there is little to do. Throws
// std::invalid_argument, naming the value, for what is not a ragged batch.
std::vector<RaggedJob> ragged_jobs(GemmMode mode, const std::vector<RowRun>& runs, int64_t threads);

}  // namespace sorted_kernels
