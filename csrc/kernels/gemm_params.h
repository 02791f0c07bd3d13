// What the GEMM kernel is given besides its operands' tensor maps; no CUDA header needed.
#pragma once

#include <cstdint>

#include "common/gemm_tiles.h"

namespace sorted_kernels {

enum class Activation : int32_t { kNone, kRelu, kGelu, kSilu };

struct GemmParams {
  GemmGrid grid;          // a uniform product; of a ragged one, the largest row's sizes
  const GemmTile* tiles;  // the schedule of a ragged product, or null
  const GemmRun* runs;    // its rows
  int32_t count;          // of tiles, unless `sizes` says otherwise
  int32_t run_count;
  const int32_t* sizes;  // rows, cols and red in device memory instead of the grid's, or null
  void* maps;            // then: place for two tensor maps a block
  void* out;
  int64_t out_stride;  // in elements
  int32_t out_cols;    // columns that may be written; those beyond a row's own become zero
  bool out_vector;     // whether out's rows begin on 16-byte boundaries (and saved's)
  bool accumulate;
  void* saved;  // what the activation saw, or null
  int64_t saved_stride;
  const void* bias;  // of the operands' dtype, or null
  Activation activation;
  float* workspace;   // partial sums, a tile for each slot
  int32_t* counters;  // of parts done, zero, one for each slot
};

constexpr int kGemmTileRows = 128;
constexpr int kGemmTileRed = 64;
constexpr int kGemmThreads = 384;  // one warpgroup copies, two multiply
constexpr int kTensorMapBytes = 128;

}  // namespace sorted_kernels
