#include "host/tile_schedule.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace sorted_kernels {
namespace {

constexpr int64_t kGroupRows = 8;
constexpr int64_t kTileK = 64;
constexpr int64_t kMaxSplit = 16;
constexpr int64_t kMinStepsPerSplit = 4;  // below that, the epilogue outweighs the reduction

struct OutputTile {
  int64_t m, n;
};
constexpr OutputTile kOutputTiles[] = {{128, 256}, {128, 128}, {64, 256}, {64, 128}, {64, 64}};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Estimated time in units of one tile-k step of a 1x1 output element: a step costs its
// multiplications or its operand loads, whichever is longer.
int64_t estimate(const GemmShape& shape, const TileChoice& choice, int64_t processors) {
  const int64_t tiles =
      ceil_div(shape.m, choice.tile_m) * ceil_div(shape.n, choice.tile_n) * choice.split_k;
  const int64_t steps = ceil_div(ceil_div(shape.k, choice.tile_k), choice.split_k);
  const int64_t area = choice.tile_m * choice.tile_n;
  const int64_t loads = (choice.tile_m + choice.tile_n) * 64;
  const int64_t epilogue = 2 * area + (choice.split_k > 1 ? 2 * area : 0);
  return ceil_div(tiles, processors) * (steps * std::max(area, loads) + epilogue);
}

void check_positive(const GemmShape& shape, const char* name, int64_t other) {
  if (shape.m < 1 || shape.n < 1 || shape.k < 1 || other < 1) {
    throw std::invalid_argument(std::string("m, n, k and ") + name + " must be at least 1");
  }
}

}  // namespace

std::string TileChoice::to_string() const {
  std::ostringstream out;
  out << "TileChoice(tile_m=" << tile_m << ", tile_n=" << tile_n << ", tile_k=" << tile_k
      << ", split_k=" << split_k << ")";
  return out.str();
}

TileChoice choose_tiles(const GemmShape& shape, int64_t processors) {
  check_positive(shape, "processors", processors);
  const int64_t max_split =
      std::clamp<int64_t>(ceil_div(shape.k, kTileK) / kMinStepsPerSplit, 1, kMaxSplit);
  TileChoice best{};
  int64_t best_time = -1;
  for (const OutputTile& tile : kOutputTiles) {
    for (int64_t split = 1; split <= max_split; split *= 2) {
      const TileChoice choice{tile.m, tile.n, kTileK, split};
      const int64_t time = estimate(shape, choice, processors);
      if (best_time < 0 || time < best_time) {
        best = choice;
        best_time = time;
      }
    }
  }
  return best;
}

std::vector<Tile> tile_schedule(const GemmShape& shape, const TileChoice& choice) {
  check_positive(shape, "every field of the tile choice",
                 std::min({choice.tile_m, choice.tile_n, choice.tile_k, choice.split_k}));
  const int64_t tile_rows = ceil_div(shape.m, choice.tile_m);
  const int64_t tile_cols = ceil_div(shape.n, choice.tile_n);
  const int64_t part = ceil_div(ceil_div(shape.k, choice.tile_k), choice.split_k) * choice.tile_k;
  std::vector<Tile> tiles;
  for (int64_t group = 0; group < tile_rows; group += kGroupRows) {
    const int64_t group_end = std::min(tile_rows, group + kGroupRows);
    for (int64_t col = 0; col < tile_cols; ++col) {
      for (int64_t row = group; row < group_end; ++row) {
        for (int64_t k = 0; k < shape.k; k += part) {
          tiles.push_back({row * choice.tile_m, std::min(shape.m, (row + 1) * choice.tile_m),
                           col * choice.tile_n, std::min(shape.n, (col + 1) * choice.tile_n), k,
                           std::min(shape.k, k + part)});
        }
      }
    }
  }
  return tiles;
}

std::string format_schedule(const std::vector<Tile>& tiles) {
  std::ostringstream out;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const Tile& tile = tiles[i];
    out << i << ": y[" << tile.m_begin << ":" << tile.m_end << ", " << tile.n_begin << ":"
        << tile.n_end << "] over k[" << tile.k_begin << ":" << tile.k_end << "]\n";
  }
  return out.str();
}

}  // namespace sorted_kernels
