// Prefix GEMM for sm_90a: out[row, col] = epilogue(sum over red of a[row, red] * b[col, red]).
//
//   forward  a = x,    b = W:   both contiguous along the reduction
//   dgrad    a = dy,   b = W^T: b contiguous along its rows (Trans)
//   wgrad    a = dy^T, b = x^T: both Trans
//
// Persistent blocks; one thread copies boxes of 64 reduction steps into a ring of stages, two
// warpgroups multiply 64 rows each and write the tile. Tensor maps are over the parents, so their
// extents (the prefix) make zeros of everything beyond. What extents cannot cut off, the operands'
// rows of shorter neighbours in a ragged batch, is zeroed in shared memory: see Clipper. Where a
// reduction is cut, the part that finishes last adds all parts up in their order, so every element
// has one writer and results are the same each time.
//
// Tiles, descriptors and the order of things follow the PTX ISA's chapter on wgmma; the split of
// roles is CUTLASS' and DeepGEMM's idea. No torch header here, and no CUDA one: sm90.cuh and the
// host's sm90_shim.h both carry this file.
#pragma once

#include <type_traits>

#include "kernels/gemm_clip.cuh"
#include "kernels/gemm_epilogue.cuh"
#include "kernels/gemm_launch.h"

namespace sorted_kernels {

// Of an operand in shared memory, 128-byte swizzled: a box has lines of 64 elements. Trans boxes
// stand side by side, kLeading apart; eight lines are kStride apart.
constexpr int kLineBytes = 128;
constexpr int kBoxBytes = kGemmTileRed * kLineBytes;  // 64 lines

SK_DEVICE uint64_t matrix_descriptor(const void* begin) {
  constexpr uint64_t kLeading = kBoxBytes, kStride = 8 * kLineBytes, kSwizzle128 = 1;
  return uint64_t((sm90::shared_address(begin) & 0x3ffff) >> 4) | (kLeading >> 4) << 16 |
         (kStride >> 4) << 32 | kSwizzle128 << 62;
}

template <typename T, typename Out, bool kTransA, bool kTransB, int kTileCols>
struct GemmSm90 {
  static constexpr int kABytes = kGemmTileRows * kLineBytes;
  static constexpr int kBBytes = kTileCols * kLineBytes;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kStages = 192 * 1024 / kStageBytes;
  static constexpr int kMaps = kStages * kStageBytes + kWarpgroups * kStagingBytes;
  static constexpr int kBarriers = kMaps + 2 * kTensorMapBytes;
  static constexpr int kSharedBytes = kBarriers + (2 * kStages + 1) * sizeof(uint64_t);
  static_assert(kSharedBytes <= 227 * 1024);

  static constexpr bool kBf16 = std::is_same_v<T, BFloat16>;
  static constexpr int kALines = kTransA ? kGemmTileRed : kGemmTileRows;  // of a box
  static constexpr int kBLines = kTransB ? kGemmTileRed : kTileCols;

  const sm90::TensorMap *a_map, *b_map;
  const GemmParams& p;
  char* shared;
  GemmGrid grid;
  int count;

  SK_DEVICE char* a_stage(int stage) const { return shared + stage * kStageBytes; }
  SK_DEVICE char* b_stage(int stage) const { return a_stage(stage) + kABytes; }
  SK_DEVICE uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(shared + kBarriers) + stage;
  }
  SK_DEVICE uint64_t* empty(int stage) const { return full(kStages + stage); }
  SK_DEVICE GemmTile tile_at(int index) const {
    return p.tiles != nullptr ? p.tiles[index] : uniform_tile(grid, index);
  }

  // A place in the ring of stages, and the parity of its present round.
  struct Cursor {
    int stage = 0, parity = 0;

    SK_DEVICE void advance() {
      stage = stage + 1 == kStages ? 0 : stage + 1;
      parity ^= stage == 0;
    }
  };

  SK_DEVICE void run() {
    const int thread = sm90::thread_index();
    if (thread == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        sm90::barrier_init(full(stage), 1);
        sm90::barrier_init(empty(stage), kConsumers / 32);
      }
      sm90::barrier_init_fence();
    }
    if (p.sizes != nullptr) take_sizes();
    sm90::block_sync();
    if (thread < kGemmThreads - kConsumers) {
      sm90::lower_registers<40>();
      if (thread == 0) produce();
    } else {
      sm90::raise_registers<232>();
      consume(thread - (kGemmThreads - kConsumers));
    }
  }

  // Sizes from device memory: maps of these extents, in this block's place of p.maps.
  SK_DEVICE void take_sizes() {
    grid.rows = p.sizes[0];
    grid.cols = p.sizes[1];
    grid.red = p.sizes[2];
    count = tile_count(grid);
    auto* maps = static_cast<sm90::TensorMap*>(p.maps) + 2 * sm90::block_index();
    auto* place = reinterpret_cast<sm90::TensorMap*>(shared + kMaps);
    if (sm90::thread_index() < 32) {
      sm90::resize_map(maps, *a_map, place, kTransA ? grid.rows : grid.red,
                       kTransA ? grid.red : grid.rows);
      sm90::resize_map(maps + 1, *b_map, place + 1, kTransB ? grid.cols : grid.red,
                       kTransB ? grid.red : grid.cols);
    }
    a_map = maps;
    b_map = maps + 1;
  }

  SK_DEVICE void produce() {
    sm90::prefetch_map(a_map);
    sm90::prefetch_map(b_map);
    Cursor at;
    for (int i = sm90::block_index(); i < count; i += sm90::block_count()) {
      const GemmTile tile = tile_at(i);
      for (int red = tile.red_begin; red < tile.red_end; red += kGemmTileRed) {
        sm90::barrier_wait(empty(at.stage), at.parity ^ 1);
        uint64_t* barrier = full(at.stage);
        sm90::barrier_arrive_expect(barrier, kStageBytes);
        load<kTransA, kGemmTileRows>(a_stage(at.stage), a_map, barrier, tile.row_begin, red);
        load<kTransB, kTileCols>(b_stage(at.stage), b_map, barrier, tile.col_begin, red);
        at.advance();
      }
    }
  }

  template <bool kTrans, int kLines>
  SK_DEVICE void load(char* target, const sm90::TensorMap* map, uint64_t* barrier, int line,
                      int red) const {
    if constexpr (!kTrans) {
      sm90::load_box(target, map, barrier, red, line);
    } else {
      for (int box = 0; box < kLines / kGemmTileRed; ++box) {
        sm90::load_box(target + box * kBoxBytes, map, barrier, line + box * kGemmTileRed, red);
      }
    }
  }

  SK_DEVICE void consume(int thread) {
    const int warpgroup = thread / kWarpgroup;
    int* verdict = reinterpret_cast<int*>(full(2 * kStages));
    TileWriter<T, Out, kTransA, kTileCols> writer{
        p, grid, shared + kStages * kStageBytes + warpgroup * kStagingBytes, thread};
    Cursor at;
    for (int i = sm90::block_index(); i < count; i += sm90::block_count()) {
      const GemmTile tile = tile_at(i);
      float sums[kTileCols / 2];
      SK_UNROLL
      for (int j = 0; j < kTileCols / 2; ++j) sums[j] = 0.0f;
      multiply(sums, tile, at, thread);
      if (tile.parts > 1 && !writer.add_parts(sums, tile, verdict)) continue;
      writer.write(sums, tile);
    }
  }

  SK_DEVICE void multiply(float (&sums)[kTileCols / 2], const GemmTile& tile, Cursor& at,
                          int thread) {
    // Trans: 16 reduction steps are 16 lines; else 32 bytes of every line.
    constexpr int kStepA = (kTransA ? 16 * kLineBytes : 32) >> 4;
    constexpr int kStepB = (kTransB ? 16 * kLineBytes : 32) >> 4;
    int before = at.stage;
    for (int red = tile.red_begin; red < tile.red_end; red += kGemmTileRed) {
      sm90::barrier_wait(full(at.stage), at.parity);
      if (red + kGemmTileRed > tile.clip_from) {
        Clipper<kTransA, kTransB, kTileCols>{p, tile, red}.clip(a_stage(at.stage),
                                                                b_stage(at.stage), thread);
        sm90::fence_async_proxy();
        sm90::named_sync(kConsumerBarrier, kConsumers);
      }
      const uint64_t a =
          matrix_descriptor(a_stage(at.stage) + thread / kWarpgroup * kABytes / kWarpgroups);
      const uint64_t b = matrix_descriptor(b_stage(at.stage));
      sm90::wgmma_fence();
      SK_UNROLL
      for (int step = 0; step < kGemmTileRed / 16; ++step) {
        sm90::wgmma<T, kTransA, kTransB>(sums, a + step * kStepA, b + step * kStepB);
      }
      sm90::wgmma_commit();
      // The product before this one is done, and its stage may be filled again.
      if (red > tile.red_begin) {
        sm90::wgmma_wait<1>();
        if (thread % 32 == 0) sm90::barrier_arrive(empty(before));
      }
      before = at.stage;
      at.advance();
    }
    sm90::wgmma_wait<0>();
    if (thread % 32 == 0) sm90::barrier_arrive(empty(before));
  }
};

template <typename T, int kTileCols, typename Action>
auto with_typed_gemm(GemmMode mode, DType out_dtype, const Action& action) {
  if (mode == GemmMode::kForward) {
    return action.template operator()<GemmSm90<T, T, false, false, kTileCols>>();
  }
  if (mode == GemmMode::kDgrad) {
    return action.template operator()<GemmSm90<T, T, false, true, kTileCols>>();
  }
  if (out_dtype == DType::kFloat32) {
    return action.template operator()<GemmSm90<T, float, true, true, kTileCols>>();
  }
  return action.template operator()<GemmSm90<T, T, true, true, kTileCols>>();
}

// Calls action.operator()<Gemm>() with the kernel for these dtypes and tiles of 128 or 256 columns.
template <typename Action>
auto with_gemm(GemmMode mode, DType dtype, DType out_dtype, int tile_cols, const Action& action) {
  const bool bf16 = dtype == DType::kBFloat16;
  if (tile_cols == 256) {
    return bf16 ? with_typed_gemm<BFloat16, 256>(mode, out_dtype, action)
                : with_typed_gemm<Float16, 256>(mode, out_dtype, action);
  }
  return bf16 ? with_typed_gemm<BFloat16, 128>(mode, out_dtype, action)
              : with_typed_gemm<Float16, 128>(mode, out_dtype, action);
}

}  // namespace sorted_kernels
