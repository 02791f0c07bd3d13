// Zeroes, in shared memory, what a ragged batch's rows do not have: an operand's box may hold
// elements of a row beyond the row's own size, which are never to count, not even as 0 * NaN.
#pragma once

#include "kernels/gemm_params.h"

namespace sorted_kernels {

constexpr int kWarpgroup = 128;
constexpr int kWarpgroups = 2;
constexpr int kConsumers = kWarpgroup * kWarpgroups;
constexpr int kConsumerBarrier = 1;  // barriers 2 and 3 are the warpgroups' own

SK_DEVICE GemmRun run_of(const GemmRun* runs, int count, int row) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (row < runs[middle].row_end) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return runs[low];
}

// Zeroes the elements from `limit` on of one line of 64. Its 16-byte pieces are swizzled: piece i
// of line j lies at i ^ (j % 8).
SK_DEVICE void clip_line(char* box, int line, int limit) {
  for (int piece = limit > 0 ? limit / 8 : 0; piece < 8; ++piece) {
    auto* at = reinterpret_cast<uint32_t*>(box + line * 128 + (piece ^ (line & 7)) * 16);
    for (int pair = 0; pair < 4; ++pair) {
      const int first = piece * 8 + pair * 2;
      at[pair] = first >= limit ? 0 : first + 1 >= limit ? at[pair] & 0xffff : at[pair];
    }
  }
}

template <bool kTransA, bool kTransB, int kTileCols>
struct Clipper {
  const GemmParams& p;
  const GemmTile& tile;
  const int red;  // where the boxes begin

  // All consumers share the work.
  SK_DEVICE void clip(char* a, char* b, int thread) const {
    if constexpr (kTransA) {
      for (int line = thread; line < kGemmTileRed; line += kConsumers) clip_batch_row(a, b, line);
    } else {
      for (int line = thread; line < kGemmTileRows; line += kConsumers) {
        const int row = tile.row_begin + line;
        if (row < tile.row_end) clip_line(a, line, run_of(p.runs, p.run_count, row).second - red);
      }
      clip_weight(b, thread);
    }
  }

 private:
  // The end of the reduction, which need not be where the parent ends.
  SK_DEVICE void clip_weight(char* b, int thread) const {
    constexpr int kLines = kTransB ? kGemmTileRed : kTileCols;
    for (int line = thread; line < kLines; line += kConsumers) {
      if constexpr (kTransB) {
        if (red + line >= tile.red_end) clip_boxes<kTileCols>(b, line, 0);
      } else {
        clip_line(b, line, tile.red_end - red);
      }
    }
  }

  // wgrad reduces over the batch: a line of both operands is a row of it.
  SK_DEVICE void clip_batch_row(char* a, char* b, int line) const {
    const GemmRun run = run_of(p.runs, p.run_count, red + line);
    int first = run.first - tile.row_begin, second = run.second - tile.col_begin;
    if (first <= 0 || second <= 0 || red + line >= tile.red_end) first = second = 0;
    clip_boxes<kGemmTileRows>(a, line, first);
    clip_boxes<kTileCols>(b, line, second);
  }

  template <int kElements>
  SK_DEVICE static void clip_boxes(char* operand, int line, int limit) {
    for (int box = 0; box < kElements / 64; ++box) {
      clip_line(operand + box * 64 * 128, line, limit - box * 64);
    }
  }
};

}  // namespace sorted_kernels
