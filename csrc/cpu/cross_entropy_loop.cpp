// The loops of the cross-entropy. CMake compiles this file once for each instruction set, with
// SK_ISA naming the namespace; only plain C headers may be included, so that the copies share no
// inline function. Loops are written so that compilers turn them into vectors.
#include <math.h>

#include "cpu/cross_entropy_cpu.h"

namespace sorted_kernels {
namespace SK_ISA {
namespace {

constexpr int64_t kLanes = 64;    // sums side by side: some vectors of any instruction set
constexpr int64_t kBlock = 4096;  // elements that are summed in float before double takes over

SK_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// exp(x) of x <= 0 or NaN, to a unit in the last place; what float would hold as a subnormal is 0.
// 2^n exp(r) with |r| <= ln(2) / 2: adding 1.5 * 2^23 rounds to the integer n, in the last bits.
SK_INLINE float exp_of(float x) {
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const float power = float_from_bits((bits_of(shifted) + 127u) << 23);
  return x < -87.0f ? 0.0f : series * power;
}

// The sum of term(i), i < count, in double but for short stretches.
template <typename Term>
SK_INLINE double sum_of(int64_t count, const Term& term) {
  double total = 0;
  int64_t i = 0;
  while (i + kLanes <= count) {
    const int64_t end = minimum(count, i + kBlock);
    float sums[kLanes] = {};
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += term(i + lane);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  }
  for (; i < count; ++i) total += term(i);
  return total;
}

template <typename T>
SK_INLINE float largest(const T* values, int64_t count) {
  float most[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = -INFINITY;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = to_compute(values[i + lane]);
      most[lane] = most[lane] < value ? value : most[lane];
    }
  }
  for (; i < count; ++i) {
    const float value = to_compute(values[i]);
    most[0] = most[0] < value ? value : most[0];
  }
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    most[0] = most[0] < most[lane] ? most[lane] : most[0];
  }
  return most[0];
}

template <typename T>
float row_loss(T* logits, int64_t target, float scale, const CrossEntropyOptions& options) {
  const int64_t words = options.words;
  const double smoothing = options.label_smoothing;
  const float most = largest(logits, words), own = to_compute(logits[target]);
  const double total =
      sum_of(words, [&](int64_t i) { return exp_of(to_compute(logits[i]) - most); });
  double loss = most + log(total) - (1 - smoothing) * own;
  if (smoothing > 0) {
    loss -= smoothing / words * sum_of(words, [&](int64_t i) { return to_compute(logits[i]); });
  }
  if (options.gradient) {
    const float factor = float(scale / total), share = float(smoothing / words * scale);
    const float kept = exp_of(own - most) * factor - share;
    for (int64_t i = 0; i < words; ++i) {
      round_to(exp_of(to_compute(logits[i]) - most) * factor - share, logits[i]);
    }
    round_to(kept - float((1 - smoothing) * scale), logits[target]);
  }
  return float(loss);
}

template <typename T>
void rows(T* logits, const int64_t* target, const float* scale, float* losses, int64_t count,
          const CrossEntropyOptions& options) {
  for (int64_t row = 0; row < count; ++row, logits += options.row_stride) {
    if (target[row] != options.ignore_index) {
      const float factor = scale == nullptr ? 1 : scale[row];
      losses[row] = row_loss(logits, target[row], factor, options);
      continue;
    }
    losses[row] = 0;
    for (int64_t i = 0; options.gradient && i < options.words; ++i) round_to(0, logits[i]);
  }
}

constexpr int64_t kTileRows = 32, kTileCols = 64;  // of half precision, a cache line of each column

template <typename T>
void add_transposed(float* total, int64_t total_stride, const T* part, int64_t part_stride,
                    int64_t rows, int64_t cols, bool accumulate) {
  float tile[kTileRows][kTileCols];
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t tile_rows = minimum(kTileRows, rows - row);
    for (int64_t col = 0; col < cols; col += kTileCols) {
      const int64_t tile_cols = minimum(kTileCols, cols - col);
      for (int64_t c = 0; c < tile_cols; ++c) {
        const T* from = part + (col + c) * part_stride + row;
        if (tile_rows == kTileRows) {  // a constant number of them: unrolled
          for (int64_t r = 0; r < kTileRows; ++r) tile[r][c] = to_compute(from[r]);
        } else {
          for (int64_t r = 0; r < tile_rows; ++r) tile[r][c] = to_compute(from[r]);
        }
      }
      for (int64_t r = 0; r < tile_rows; ++r) {
        float* to = total + (row + r) * total_stride + col;
        if (accumulate) {
          for (int64_t c = 0; c < tile_cols; ++c) to[c] += tile[r][c];
        } else {
          for (int64_t c = 0; c < tile_cols; ++c) to[c] = tile[r][c];
        }
      }
    }
  }
}

}  // namespace

const AllCrossEntropyLoops cross_entropy_loops = {
    {rows<float>, add_transposed<float>},
    {rows<BFloat16>, add_transposed<BFloat16>},
    {rows<Float16>, add_transposed<Float16>},
};

}  // namespace SK_ISA
}  // namespace sorted_kernels
