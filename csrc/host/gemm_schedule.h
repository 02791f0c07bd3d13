// Tile choice and tile schedule of prefix GEMMs: which block of the active output is computed when,
// and over which part of the reduction. A uniform product is the case of one run.
//
// forward: y[r, :m_r] = x[r, :k_r] @ W[:m_r, :k_r]^T; dgrad: dx[r, :k_r] = dy[r, :m_r] @ W[:m_r,
// :k_r]; wgrad: dW[i, j] = sum of dy[r, i] * x[r, j] over the rows r that use W[i, j]. Runs are
// sorted, largest first in both sizes, so the rows that use an element are the first of the batch,
// and all elements of the first run's rectangle are used.
//
// A tile of forward and dgrad that is at least half full ends where its run ends; a smaller one
// goes on into the next run, and the kernel masks. Its reduction is that of its first row, the
// longest.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/gemm_tiles.h"

namespace sorted_kernels {

struct RowRun {
  int64_t rows, m, k;
};

// Output rows, output columns and reduction of a tile, and into how many parts the longest
// reduction is cut (shorter ones into parts of the same length).
struct TileChoice {
  int32_t tile_m, tile_n, tile_k, split_k;

  std::string to_string() const;
};

struct GemmSchedule {
  GemmMode mode;
  TileChoice choice;
  std::vector<GemmRun> runs;
  std::vector<GemmTile> tiles;  // in launch order: longest first
  int32_t slots;                // parts of tiles whose reduction is cut
  int64_t flops;                // two for each product that a row needs, as the tiles cover them
};

// Throws std::invalid_argument, naming the value, for what is not a ragged batch or not a choice.
GemmSchedule schedule_gemm(GemmMode mode, const std::vector<RowRun>& runs,
                           const TileChoice& choice);

// The whole product as one grid: of a ragged one, with the sizes of the largest row.
GemmGrid grid_of(const GemmSchedule& schedule);

// Picks, among the tiles that the kernel has, the one with the least estimated time on
// `processors` multiprocessors, with the reduction cut when the output alone leaves some idle.
TileChoice choose_tiles(GemmMode mode, const std::vector<RowRun>& runs, int32_t processors);

// One line a tile, for people.
std::string format_schedule(const GemmSchedule& schedule);

}  // namespace sorted_kernels
