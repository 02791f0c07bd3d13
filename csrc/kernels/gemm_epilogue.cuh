// From the sums in two warpgroups' registers to the output: parts of a cut reduction are added up;
// bias, activation, masks; then whole 16-byte pieces of rows, through shared memory.
#pragma once

#include "kernels/gemm_clip.cuh"

namespace sorted_kernels {

constexpr int kStagingCols = 64;
constexpr int kStagingBytes = 64 * kStagingCols * int(sizeof(float));  // a warpgroup's 64 rows

SK_DEVICE void activate(float (&v)[8], Activation activation) {
  if (activation == Activation::kRelu) {
    SK_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i];  // keeps NaN
  } else if (activation == Activation::kGelu) {
    SK_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = 0.5f * v[i] * (1.0f + erff(v[i] * 0.70710678118654752f));
  } else if (activation == Activation::kSilu) {
    SK_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = v[i] / (1.0f + expf(-v[i]));
  }
}

// Eight neighbouring elements of a row of which `count` may be written, as 16-byte pieces if whole.
template <typename T>
SK_DEVICE void write_piece(T* out, const float (&v)[8], int count, bool vector, bool accumulate) {
  if (count >= 8 && vector) {
    auto* packed = reinterpret_cast<uint4*>(out);
    float old[8] = {};
    if (accumulate) {
      const uint4 read = *packed;
      const uint32_t words[4] = {read.x, read.y, read.z, read.w};
      SK_UNROLL
      for (int i = 0; i < 8; ++i) {
        old[i] = to_compute(T{uint16_t(words[i / 2] >> (i % 2 * 16))});
      }
    }
    *packed = uint4{sm90::narrow(old[0] + v[0], old[1] + v[1], T{}),
                    sm90::narrow(old[2] + v[2], old[3] + v[3], T{}),
                    sm90::narrow(old[4] + v[4], old[5] + v[5], T{}),
                    sm90::narrow(old[6] + v[6], old[7] + v[7], T{})};
    return;
  }
  SK_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i >= count) break;
    const float value = accumulate ? to_compute(out[i]) + v[i] : v[i];
    out[i].bits = uint16_t(sm90::narrow(value, 0.0f, T{}));
  }
}

// float32 gradients are never read: the L2 cache adds.
SK_DEVICE void write_piece(float* out, const float (&v)[8], int count, bool vector,
                           bool accumulate) {
  if (count >= 8 && vector) {
    SK_UNROLL
    for (int half = 0; half < 8; half += 4) {
      const float4 four{v[half], v[half + 1], v[half + 2], v[half + 3]};
      if (accumulate) {
        sm90::reduce_add(out + half, four);
      } else {
        *reinterpret_cast<float4*>(out + half) = four;
      }
    }
    return;
  }
  SK_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i >= count) break;
    if (accumulate) {
      sm90::reduce_add(out + i, v[i]);
    } else {
      out[i] = v[i];
    }
  }
}

template <typename T, typename Out, bool kWgrad, int kTileCols>
struct TileWriter {
  static constexpr int kSums = kTileCols / 2;  // a thread's share of 64 rows

  const GemmParams& p;
  const GemmGrid& grid;
  char* staging;
  const int thread;  // among the consumers

  // Leaves this part's sums in the workspace; true for the part that comes last, which then has
  // the sums of all, added up in their order whatever the order they came in.
  SK_DEVICE bool add_parts(float (&sums)[kSums], const GemmTile& tile, int* verdict) {
    constexpr int kFours = kSums / 4;
    auto* slots = reinterpret_cast<float4*>(p.workspace) + thread;
    auto* own = slots + int64_t(tile.slot) * kFours * kConsumers;
    SK_UNROLL
    for (int i = 0; i < kFours; ++i) {
      own[i * kConsumers] = float4{sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
    }
    sm90::fence_device();
    sm90::named_sync(kConsumerBarrier, kConsumers);
    const int first = tile.slot - tile.part;
    if (thread == 0) *verdict = sm90::add_one(p.counters + first) == tile.parts - 1;
    sm90::named_sync(kConsumerBarrier, kConsumers);
    if (*verdict == 0) return false;
    sm90::fence_device();
    SK_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    for (int part = 0; part < tile.parts; ++part) {
      const auto* other = slots + int64_t(first + part) * kFours * kConsumers;
      SK_UNROLL
      for (int i = 0; i < kFours; ++i) {
        const float4 four = sm90::load_shared_result(other + i * kConsumers);
        sums[4 * i] += four.x;
        sums[4 * i + 1] += four.y;
        sums[4 * i + 2] += four.z;
        sums[4 * i + 3] += four.w;
      }
    }
    return true;
  }

  SK_DEVICE void write(const float (&sums)[kSums], const GemmTile& tile) {
    const int warpgroup = thread / kWarpgroup, lane = thread % 32;
    const int first_row = tile.row_begin + warpgroup * 64 + thread % kWarpgroup / 8;
    const int barrier = kConsumerBarrier + 1 + warpgroup;
    const bool ragged = !kWgrad && p.runs != nullptr;
    const GemmRun run =
        ragged ? run_of(p.runs, p.run_count, tile.row_begin) : GemmRun{INT32_MAX, grid.cols, 0};
    // Of each eight columns a thread has two in row `row` and two in row + 8.
    const int row = thread % kWarpgroup / 32 * 16 + lane / 4;
    SK_UNROLL
    for (int begin = 0; begin < kTileCols; begin += kStagingCols) {
      if (tile.col_begin + begin >= out_cols()) break;
      sm90::named_sync(barrier, kWarpgroup);  // the columns before are out
      SK_UNROLL
      for (int eight = 0; eight < kStagingCols / 8; ++eight) {
        const float* four = sums + begin / 2 + eight * 4;
        const int col = eight * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(place(row, col)) = float2{four[0], four[1]};
        *reinterpret_cast<float2*>(place(row + 8, col)) = float2{four[2], four[3]};
      }
      sm90::named_sync(barrier, kWarpgroup);
      const int col = tile.col_begin + begin + thread % 8 * 8;
      for (int i = 0; i < 64; i += 16) {  // four rows a thread
        const int row = first_row + i;
        if (row >= tile.row_end || col >= out_cols()) continue;
        const int limit = row < run.row_end ? run.first : run_of(p.runs, p.run_count, row).first;
        write_eight(thread % kWarpgroup / 8 + i, row, col, limit);
      }
    }
  }

 private:
  // Padding up to the next 64 columns is written too, as zeros; a gradient has no padding.
  SK_DEVICE int out_cols() const {
    if (p.sizes == nullptr) return p.out_cols;
    return kWgrad ? grid.cols : smaller(p.out_cols, ceil_div(grid.cols, 64) * 64);
  }

  // Pieces of 16 bytes are swizzled against bank conflicts.
  SK_DEVICE char* place(int row, int col) const {
    return staging + row * kStagingCols * 4 + ((col / 4) ^ ((row & 7) * 2)) * 16 + col % 4 * 4;
  }

  // `limit` is how many columns the row has.
  SK_DEVICE void write_eight(int staged_row, int row, int col, int limit) const {
    float v[8];
    SK_UNROLL
    for (int half = 0; half < 8; half += 4) {
      const float4 four =
          *reinterpret_cast<const float4*>(place(staged_row, col % kStagingCols + half));
      v[half] = four.x;
      v[half + 1] = four.y;
      v[half + 2] = four.z;
      v[half + 3] = four.w;
    }
    const int count = out_cols() - col;
    if (!kWgrad) {
      const T* bias = static_cast<const T*>(p.bias);
      SK_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (bias != nullptr && col + i < limit) v[i] += to_compute(bias[col + i]);
        if (col + i >= limit) v[i] = 0.0f;
      }
      if (p.saved != nullptr) {
        write_piece(static_cast<T*>(p.saved) + row * p.saved_stride + col, v, count, p.out_vector,
                    false);
      }
      activate(v, p.activation);
    }
    write_piece(static_cast<Out*>(p.out) + row * p.out_stride + col, v, count, p.out_vector,
                kWgrad && p.accumulate);
  }
};

}  // namespace sorted_kernels
