// What one unit of a GEMM's work is, for the host that plans it and the kernel that does it. Every
// product here is out[row, col] = sum over red of a[row, red] * b[col, red].
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace sorted_kernels {

enum class GemmMode : int { kForward, kDgrad, kWgrad };

constexpr int32_t kNoClip = INT32_MAX;
constexpr int32_t kGroupRows = 8;  // tile rows walked together, so that they share operands in L2

// Output rows and columns [begin, end) over the reduction [red_begin, red_end).
struct GemmTile {
  int32_t row_begin, row_end, col_begin, col_end, red_begin, red_end;
  // From this reduction index on, the operands hold elements of neighbours that must count as
  // zero, and that the tensors' extents do not cut off. kNoClip: nowhere.
  int32_t clip_from;
  // Which part of how many, where the reduction is cut; slot numbers the parts of all such tiles.
  int32_t part, parts, slot;
};

// Rows up to row_end (from the end of the run before) and their two sizes: output columns and
// reduction of forward and dgrad; output rows and columns that they take part in for wgrad.
struct GemmRun {
  int32_t row_end, first, second;
};

// A uniform product and how it is cut.
struct GemmGrid {
  int32_t rows, cols, red;
  int32_t tile_rows, tile_cols, tile_red, split;
};

SK_INLINE int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
SK_INLINE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// Length of the parts into which a reduction is cut: whole steps of tile_red, at most `split`
// parts.
SK_INLINE int32_t part_length(int32_t red, int32_t tile_red, int32_t split) {
  return ceil_div(ceil_div(red, tile_red), split) * tile_red;
}

SK_INLINE int32_t tile_count(const GemmGrid& g) {
  return ceil_div(g.rows, g.tile_rows) * ceil_div(g.cols, g.tile_cols) *
         ceil_div(g.red, part_length(g.red, g.tile_red, g.split));
}

// The index-th tile of a uniform product. The kernel calls this where the sizes are known to the
// device alone, and the host's schedule of a single run is made of it.
SK_INLINE GemmTile uniform_tile(const GemmGrid& g, int32_t index) {
  const int32_t length = part_length(g.red, g.tile_red, g.split);
  const int32_t parts = ceil_div(g.red, length);
  const int32_t tile_rows = ceil_div(g.rows, g.tile_rows);
  const int32_t tile_cols = ceil_div(g.cols, g.tile_cols);
  const int32_t part = index % parts, place = index / parts;
  const int32_t group = place / (kGroupRows * tile_cols) * kGroupRows;
  const int32_t inside = place - group * tile_cols;
  const int32_t height = smaller(kGroupRows, tile_rows - group);
  const int32_t row = (group + inside % height) * g.tile_rows;
  const int32_t col = inside / height * g.tile_cols;
  return {row,           smaller(g.rows, row + g.tile_rows),
          col,           smaller(g.cols, col + g.tile_cols),
          part * length, smaller(g.red, (part + 1) * length),
          kNoClip,       part,
          parts,         parts > 1 ? index : 0};
}

}  // namespace sorted_kernels
