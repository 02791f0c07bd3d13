#include "host/gemm_schedule.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace sorted_kernels {
namespace {

constexpr int32_t kTileK = 64;
constexpr int32_t kMaxSplit = 16;
constexpr int32_t kMinStepsPerPart = 4;  // below that, the epilogue outweighs the reduction
constexpr TileChoice kTiles[] = {{128, 256, kTileK, 1}, {128, 128, kTileK, 1}};

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::vector<GemmRun> checked_runs(GemmMode mode, const std::vector<RowRun>& runs) {
  if (runs.empty()) {
    fail("runs is empty; at least one (rows, m, k) is needed");
  }
  constexpr int64_t kLimit = INT32_MAX / 2;  // leaves room to add a tile to an index
  std::vector<GemmRun> list;
  int64_t rows = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const RowRun& run = runs[i];
    std::ostringstream text;
    text << "runs[" << i << "] is (" << run.rows << ", " << run.m << ", " << run.k << "); ";
    rows += run.rows;
    if (std::min({run.rows, run.m, run.k}) < 1 || std::max({rows, run.m, run.k}) > kLimit) {
      fail(text.str() + "counts are at least 1 and together below 2^30");
    }
    if (i > 0 && (run.m > runs[i - 1].m || run.k > runs[i - 1].k)) {
      fail(text.str() + "runs are sorted largest first, in both sizes");
    }
    const bool swapped = mode == GemmMode::kDgrad;
    list.push_back(
        {int32_t(rows), int32_t(swapped ? run.k : run.m), int32_t(swapped ? run.m : run.k)});
  }
  return list;
}

class Builder {
 public:
  Builder(const std::vector<GemmRun>& runs, const TileChoice& choice, int32_t longest)
      : runs_(runs), choice_(choice) {
    part_ = part_length(longest, choice.tile_k, choice.split_k);
  }

  // Tiles are walked in groups of tile rows, column by column.
  void add_row_tiles() {
    const std::vector<int32_t> cuts = row_cuts();
    const int32_t blocks = int32_t(cuts.size()) - 1;
    for (int32_t group = 0; group < blocks; group += kGroupRows) {
      const int32_t group_end = smaller(blocks, group + kGroupRows);
      for (int32_t col = 0; col < run_of(cuts[group]).first; col += choice_.tile_n) {
        const int32_t rows = rows_with(&GemmRun::first, col + 1);
        for (int32_t block = group; block < group_end && cuts[block] < rows; ++block) {
          add_row_tile(cuts[block], smaller(cuts[block + 1], rows), col);
        }
      }
    }
  }

  void add_weight_tiles() {
    const int32_t m = runs_[0].first, k = runs_[0].second;
    const int32_t blocks = ceil_div(m, choice_.tile_m);
    for (int32_t group = 0; group < blocks; group += kGroupRows) {
      for (int32_t col = 0; col < k; col += choice_.tile_n) {
        for (int32_t block = group; block < smaller(blocks, group + kGroupRows); ++block) {
          const int32_t row = block * choice_.tile_m;
          const int32_t row_end = smaller(m, row + choice_.tile_m);
          const int32_t col_end = smaller(k, col + choice_.tile_n);
          add_parts({row, row_end, col, col_end, 0, rows_using(row + 1, col + 1),
                     rows_using(row_end, col_end)},
                    runs_.back().row_end);
        }
      }
    }
  }

  std::vector<GemmTile> tiles;
  int32_t slots = 0;

 private:
  const GemmRun& run_of(int32_t row) const {
    return *std::find_if(runs_.begin(), runs_.end(),
                         [row](const GemmRun& run) { return row < run.row_end; });
  }

  // How many rows have at least this size; they are the first ones.
  int32_t rows_with(int32_t GemmRun::* size, int32_t least) const {
    int32_t rows = 0;
    for (const GemmRun& run : runs_) {
      if (run.*size >= least) rows = run.row_end;
    }
    return rows;
  }

  int32_t rows_using(int32_t first, int32_t second) const {
    return smaller(rows_with(&GemmRun::first, first), rows_with(&GemmRun::second, second));
  }

  std::vector<int32_t> row_cuts() const {
    std::vector<int32_t> cuts{0};
    for (size_t run = 0; cuts.back() < runs_.back().row_end;) {
      const int32_t begin = cuts.back();
      while (runs_[run].row_end <= begin) ++run;
      size_t last = run;
      while (last + 1 < runs_.size() && runs_[last].row_end - begin < choice_.tile_m / 2) ++last;
      cuts.push_back(smaller(runs_[last].row_end, begin + choice_.tile_m));
    }
    return cuts;
  }

  void add_row_tile(int32_t row, int32_t row_end, int32_t col) {
    const GemmRun &first = run_of(row), &last = run_of(row_end - 1);
    add_parts({row, row_end, col, smaller(first.first, col + choice_.tile_n), 0, first.second,
               last.second},
              runs_[0].second);
  }

  // `tile.clip_from` is up to where every line of the operands counts in full; `extent` is where
  // the operands end, and zeros begin by themselves.
  void add_parts(GemmTile tile, int32_t extent) {
    const bool overhangs = tile.red_end % choice_.tile_k != 0 && tile.red_end < extent;
    if (tile.clip_from >= tile.red_end && !overhangs) tile.clip_from = kNoClip;
    const int32_t end = tile.red_end;
    tile.parts = ceil_div(end, part_);
    for (tile.part = 0; tile.part < tile.parts; ++tile.part) {
      tile.red_begin = tile.part * part_;
      tile.red_end = smaller(end, tile.red_begin + part_);
      tile.slot = tile.parts > 1 ? slots++ : 0;
      tiles.push_back(tile);
    }
  }

  const std::vector<GemmRun>& runs_;
  const TileChoice choice_;
  int32_t part_;
};

int64_t overlap(int32_t begin, int32_t end, int32_t limit) {
  return std::max(0, smaller(end, limit) - begin);
}

int64_t flops_of(GemmMode mode, const std::vector<GemmRun>& runs, const GemmTile& tile) {
  const bool weight = mode == GemmMode::kWgrad;
  const int32_t begin = weight ? tile.red_begin : tile.row_begin;
  const int32_t end = weight ? tile.red_end : tile.row_end;
  int64_t flops = 0;
  int32_t row = 0;
  for (const GemmRun& run : runs) {
    const int64_t rows = overlap(std::max(begin, row), end, run.row_end);
    const int64_t a = weight ? overlap(tile.row_begin, tile.row_end, run.first)
                             : overlap(tile.red_begin, tile.red_end, run.second);
    const int64_t b = overlap(tile.col_begin, tile.col_end, weight ? run.second : run.first);
    flops += 2 * rows * a * b;
    row = run.row_end;
  }
  return flops;
}

int32_t steps_of(const GemmTile& tile, const TileChoice& choice) {
  return ceil_div(tile.red_end - tile.red_begin, choice.tile_k);
}

// Estimated time in units of one reduction step of a 1x1 output element: a step costs its
// multiplications or its operand loads, whichever is longer. Block b of the kernel takes tiles b,
// b + processors, and so on; the first block has the longest of each wave.
int64_t estimate(const GemmSchedule& schedule, int32_t processors) {
  const TileChoice& choice = schedule.choice;
  const int64_t area = int64_t(choice.tile_m) * choice.tile_n;
  const int64_t loads = int64_t(choice.tile_m + choice.tile_n) * choice.tile_k;
  int64_t time = 0;
  for (size_t i = 0; i < schedule.tiles.size(); i += processors) {
    const GemmTile& tile = schedule.tiles[i];
    time += steps_of(tile, choice) * std::max(area, loads) + (tile.parts > 1 ? 4 : 2) * area;
  }
  return time;
}

}  // namespace

std::string TileChoice::to_string() const {
  std::ostringstream out;
  out << "TileChoice(tile_m=" << tile_m << ", tile_n=" << tile_n << ", tile_k=" << tile_k
      << ", split_k=" << split_k << ")";
  return out.str();
}

GemmGrid grid_of(const GemmSchedule& schedule) {
  const GemmRun& run = schedule.runs[0];
  const int32_t rows = schedule.runs.back().row_end;
  const TileChoice& choice = schedule.choice;
  const bool weight = schedule.mode == GemmMode::kWgrad;
  return {weight ? run.first : rows,
          weight ? run.second : run.first,
          weight ? rows : run.second,
          choice.tile_m,
          choice.tile_n,
          choice.tile_k,
          choice.split_k};
}

GemmSchedule schedule_gemm(GemmMode mode, const std::vector<RowRun>& runs,
                           const TileChoice& choice) {
  if (std::min({choice.tile_m, choice.tile_n, choice.tile_k, choice.split_k}) < 1) {
    fail(choice.to_string() + " is no choice of tiles; every field is at least 1");
  }
  GemmSchedule schedule{mode, choice, checked_runs(mode, runs), {}, 0, 0};
  const GemmGrid grid = grid_of(schedule);
  if (runs.size() == 1) {
    for (int32_t i = 0; i < tile_count(grid); ++i) {
      schedule.tiles.push_back(uniform_tile(grid, i));
      schedule.slots += schedule.tiles.back().parts > 1;
    }
  } else {
    Builder builder(schedule.runs, choice, grid.red);
    mode == GemmMode::kWgrad ? builder.add_weight_tiles() : builder.add_row_tiles();
    schedule.tiles = std::move(builder.tiles);
    schedule.slots = builder.slots;
    std::stable_sort(schedule.tiles.begin(), schedule.tiles.end(),
                     [&](const GemmTile& a, const GemmTile& b) {
                       return steps_of(a, choice) > steps_of(b, choice);
                     });
  }
  for (const GemmTile& tile : schedule.tiles) {
    schedule.flops += flops_of(mode, schedule.runs, tile);
  }
  return schedule;
}

TileChoice choose_tiles(GemmMode mode, const std::vector<RowRun>& runs, int32_t processors) {
  if (processors < 1) {
    fail("processors=" + std::to_string(processors) + "; at least 1 is needed");
  }
  TileChoice best{};
  int64_t best_time = -1;
  for (TileChoice choice : kTiles) {
    const GemmSchedule whole = schedule_gemm(mode, runs, choice);
    const int32_t most = steps_of(whole.tiles[0], choice) / kMinStepsPerPart;
    const bool idle = whole.tiles.size() < 2 * size_t(processors);
    for (int32_t split = 1; split == 1 || (idle && split <= smaller(most, kMaxSplit)); split *= 2) {
      choice.split_k = split;
      const int64_t time =
          estimate(split == 1 ? whole : schedule_gemm(mode, runs, choice), processors);
      if (best_time < 0 || time < best_time) {
        best = choice;
        best_time = time;
      }
    }
  }
  return best;
}

std::string format_schedule(const GemmSchedule& schedule) {
  std::ostringstream out;
  for (size_t i = 0; i < schedule.tiles.size(); ++i) {
    const GemmTile& tile = schedule.tiles[i];
    out << i << ": out[" << tile.row_begin << ":" << tile.row_end << ", " << tile.col_begin << ":"
        << tile.col_end << "] over [" << tile.red_begin << ":" << tile.red_end << "]";
    if (tile.parts > 1) out << ", part " << tile.part + 1 << " of " << tile.parts;
    if (tile.clip_from != kNoClip) out << ", masked from " << tile.clip_from;
    out << "\n";
  }
  return out.str();
}

}  // namespace sorted_kernels
