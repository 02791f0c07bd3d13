// Tile choice and tile schedule of a uniform prefix GEMM: which block of the active output is
// computed when, and over which part of the reduction.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sorted_kernels {

// y[:m, :n] = x[:m, :k] @ w[:n, :k]^T: counts of active rows, columns and reduction length.
struct GemmShape {
  int64_t m, n, k;
};

struct TileChoice {
  int64_t tile_m, tile_n, tile_k;
  int64_t split_k;  // number of parts into which the reduction is cut

  std::string to_string() const;
};

// One unit of work: output rows and columns [begin, end) over reduction [k_begin, k_end).
struct Tile {
  int64_t m_begin, m_end, n_begin, n_end, k_begin, k_end;
};

// Picks the tile with the least estimated time on `processors` streaming multiprocessors: waves of
// tiles times the cost of one, with the reduction cut when the output alone leaves some idle.
TileChoice choose_tiles(const GemmShape& shape, int64_t processors);

// All tiles in launch order. Tiles are walked in groups of eight tile rows, column by column, so
// that concurrent tiles share operands in the L2 cache.
std::vector<Tile> tile_schedule(const GemmShape& shape, const TileChoice& choice);

// One line per tile, for people.
std::string format_schedule(const std::vector<Tile>& tiles);

}  // namespace sorted_kernels
