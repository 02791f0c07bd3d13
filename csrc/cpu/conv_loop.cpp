// The loops of convolutions of few channels. CMake compiles this file once for each instruction
// set, with SK_ISA naming the namespace; only plain C headers may be included, so that the copies
// share no inline function.
#include <string.h>

#include "cpu/conv_cpu.h"

namespace sorted_kernels {
namespace SK_ISA {
namespace {

constexpr int kTileChannels = 4;
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr int kTileRows = 4;
constexpr int kWideTileChannels = 8;  // there are twice as many registers
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
constexpr int kTileRows = 2;
constexpr int kWideTileChannels = kTileChannels;
#else
constexpr int64_t kLanes = 4;
constexpr int kTileRows = 2;
constexpr int kWideTileChannels = kTileChannels;
#endif
constexpr int kTileTaps = 3;
constexpr int64_t kTileFloats = 4096;  // of activations; two thirds of a first-level cache are left

// A tile's sums fill the vector registers; loops around it would take the others from its
// addresses.
#define SK_OWN_REGISTERS __attribute__((noinline))

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef float UnalignedVector
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }

inline void store(float* to, Vector value) { *reinterpret_cast<UnalignedVector*>(to) = value; }

// Halves are added, so that lanes stay busy for as long as there are several.
template <int64_t kCount>
inline float sum(const float* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    float halves[kCount / 2];
    for (int64_t i = 0; i < kCount / 2; ++i) halves[i] = values[i] + values[i + kCount / 2];
    return sum<kCount / 2>(halves);
  }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t whole_vectors(int64_t count) { return divide_up(count, kLanes) * kLanes; }

template <int kCount>
struct Count {};

// Cuts [first, end) into tiles of kMost, and the rest into ever smaller ones: tile(Count, first).
template <int kMost, typename Tile>
inline void in_tiles(int64_t first, int64_t end, const Tile& tile) {
  for (; first + kMost <= end; first += kMost) tile(Count<kMost>(), first);
  if constexpr (kMost > 1) in_tiles<kMost / 2>(first, end, tile);
}

// An image with its padding, as the loops read it: along a row, pixels that outputs side by side
// meet lie side by side. A stride of s makes s phases of each row, of every s-th pixel each.
struct Frame {
  explicit Frame(const Conv& conv)
      : conv(conv),
        phase_size((conv.cols.kernel - 1) * conv.cols.dilation / conv.cols.stride +
                   whole_vectors(conv.cols.out)),
        row_size(conv.cols.stride * phase_size),
        channel_size(conv.rows.padded() * row_size) {}

  int64_t size() const { return conv.in_channels * channel_size; }

  // Where output row 0, column 0 meets a tap.
  int64_t tap(int64_t row, int64_t col) const {
    const int64_t pixel = col * conv.cols.dilation;
    return row * conv.rows.dilation * row_size + pixel % conv.cols.stride * phase_size +
           pixel / conv.cols.stride;
  }

  // Copies an image in. What it leaves is the padding, which must be zero.
  void fill(float* frame, const float* image) const {
    const ConvAxis &rows = conv.rows, &cols = conv.cols;
    for (int64_t channel = 0; channel < conv.in_channels; ++channel) {
      for (int64_t row = 0; row < rows.in; ++row) {
        const int64_t place = row * rows.insert + rows.pad;
        if (place < 0 || place >= rows.padded()) continue;
        fill_row(frame + channel * channel_size + place * row_size,
                 image + (channel * rows.in + row) * cols.in);
      }
    }
  }

  void fill_row(float* to, const float* from) const {
    const ConvAxis& cols = conv.cols;
    if (cols.stride > 1) {  // then insert is 1
      for (int64_t phase = 0; phase < cols.stride; ++phase, to += phase_size) {
        int64_t place = phase;
        if (cols.pad > phase) place += divide_up(cols.pad - phase, cols.stride) * cols.stride;
        const int64_t end = minimum(cols.padded(), cols.in + cols.pad);
        for (int64_t i = place / cols.stride; place < end; place += cols.stride, ++i) {
          to[i] = from[place - cols.pad];
        }
      }
      return;
    }
    const int64_t begin = cols.pad < 0 ? divide_up(-cols.pad, cols.insert) : 0;
    const int64_t end = minimum(cols.in, divide_up(cols.padded() - cols.pad, cols.insert));
    to += cols.pad;
    if (cols.insert > 1) {
      for (int64_t col = begin; col < end; ++col) to[col * cols.insert] = from[col];
    } else if (end > begin) {
      memcpy(to + begin, from + begin, (end - begin) * sizeof(float));
    }
  }

  const Conv& conv;
  const int64_t phase_size, row_size, channel_size;
};

// What an output of a tile sums over: taps, by where they lie in a frame and in a weight.
struct Taps {
  Taps(const Frame& frame, const ConvWeight& weight) : count(frame.conv.taps()) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i / frame.conv.cols.kernel, col = i % frame.conv.cols.kernel;
      x[i] = frame.tap(row, col);
      w[i] = row * weight.row_stride + col * weight.col_stride;
    }
  }

  int64_t count;
  int64_t x[kMaxConvTaps], w[kMaxConvTaps];
};

// Channels x Rows vectors of outputs, from where `frame` and `weight` have their first tap.
template <int kChannels, int kRows>
SK_OWN_REGISTERS void forward_tile(const Frame& layout, const Taps& taps, const float* frame,
                                   const ConvWeight& w, const float* bias, float* y, int64_t cols) {
  const Conv& conv = layout.conv;
  const int64_t row_step = conv.rows.stride * layout.row_size;
  Vector sum[kChannels][kRows];
  for (int c = 0; c < kChannels; ++c) {
    for (int r = 0; r < kRows; ++r) sum[c][r] = Vector{} + (bias == nullptr ? 0 : bias[c]);
  }
  for (int64_t channel = 0; channel < conv.in_channels; ++channel) {
    const float* pixels = frame + channel * layout.channel_size;
    const float* values = w.data + channel * w.in_stride;
    for (int64_t tap = 0; tap < taps.count; ++tap) {
      Vector x[kRows];
      for (int r = 0; r < kRows; ++r) x[r] = load(pixels + taps.x[tap] + r * row_step);
      for (int c = 0; c < kChannels; ++c) {
        const float value = values[taps.w[tap] + c * w.out_stride];
        for (int r = 0; r < kRows; ++r) sum[c][r] += value * x[r];
      }
    }
  }
  for (int c = 0; c < kChannels; ++c) {
    for (int r = 0; r < kRows; ++r) {
      float* row = y + c * conv.out_pixels() + r * conv.cols.out;
      if (cols == kLanes) {
        store(row, sum[c][r]);
      } else {
        memcpy(row, &sum[c][r], cols * sizeof(float));
      }
    }
  }
}

template <int kChannels, int kRows>
void forward_rows(Count<kChannels>, Count<kRows>, const Frame& layout, const Taps& taps,
                  const float* frame, const ConvWeight& w, const float* bias, float* y) {
  for (int64_t col = 0; col < layout.conv.cols.out; col += kLanes) {
    const int64_t cols = minimum(kLanes, layout.conv.cols.out - col);
    forward_tile<kChannels, kRows>(layout, taps, frame + col, w, bias, y + col, cols);
  }
}

int64_t forward_scratch(const Conv& conv) { return Frame(conv).size(); }

void forward(const Conv& conv, const float* x, ConvWeight weight, const float* bias, float* y,
             int64_t images, float* scratch) {
  const Frame layout(conv);
  const Taps taps(layout, weight);
  const int64_t row_step = conv.rows.stride * layout.row_size;
  memset(scratch, 0, layout.size() * sizeof(float));
  for (int64_t image = 0; image < images; ++image) {
    layout.fill(scratch, x + image * conv.in_channels * conv.in_pixels());
    float* out = y + image * conv.out_channels * conv.out_pixels();
    in_tiles<kTileChannels>(0, conv.out_channels, [&](auto channels, int64_t c) {
      const ConvWeight w{weight.data + c * weight.out_stride, weight.out_stride, weight.in_stride,
                         weight.row_stride, weight.col_stride};
      const float* shift = bias == nullptr ? nullptr : bias + c;
      in_tiles<kTileRows>(0, conv.rows.out, [&](auto rows, int64_t row) {
        forward_rows(channels, rows, layout, taps, scratch + row * row_step, w, shift,
                     out + c * conv.out_pixels() + row * conv.cols.out);
      });
    });
  }
}

// dy as wgrad reads it: rows of whole vectors, zero past the last pixel.
struct Rows {
  explicit Rows(const Conv& conv)
      : conv(conv),
        row_size(whole_vectors(conv.cols.out)),
        channel_size(conv.rows.out * row_size) {}

  int64_t size() const { return conv.out_channels * channel_size; }

  void fill(float* rows, const float* dy) const {
    for (int64_t row = 0; row < conv.out_channels * conv.rows.out; ++row) {
      memcpy(rows + row * row_size, dy + row * conv.cols.out, conv.cols.out * sizeof(float));
    }
  }

  const Conv& conv;
  const int64_t row_size, channel_size;
};

// Images side by side, so that a tile has more to sum between the load of its sums and the store:
// as many as leave what it reads of them in the first-level cache.
struct Group {
  Group(const Frame& frame, const Rows& rows) : frame(frame), rows(rows) {
    const int64_t floats = kTileChannels * rows.channel_size + frame.channel_size;
    images = minimum(8, divide_up(kTileFloats, floats));
  }

  const Frame& frame;
  const Rows& rows;
  int64_t images;
};

// Channels x Taps weights' gradients, summed over the images but not over the lanes: into `sums`, a
// vector a weight, in which channels lie `step` apart.
template <int kChannels, int kTaps>
SK_OWN_REGISTERS void wgrad_tile(Count<kTaps>, const Group& group, const int64_t* taps,
                                 const float* frames, const float* upstream, Vector* sums,
                                 int64_t step) {
  const ConvAxis& axis = group.frame.conv.rows;
  const int64_t row_step = axis.stride * group.frame.row_size;
  const int64_t row_size = group.rows.row_size, channel_size = group.rows.channel_size;
  Vector sum[kChannels][kTaps];
  for (int c = 0; c < kChannels; ++c) {
    for (int t = 0; t < kTaps; ++t) sum[c][t] = sums[c * step + t];
  }
  int64_t offsets[kTaps];
  for (int t = 0; t < kTaps; ++t) offsets[t] = taps[t] - taps[0];
  for (int64_t image = 0; image < group.images; ++image) {
    const float* dy = upstream + image * group.rows.size();
    const float* pixels = frames + image * group.frame.size() + taps[0];
    for (int64_t row = 0; row < axis.out; ++row, pixels += row_step) {
      for (int64_t col = 0; col < row_size; col += kLanes, dy += kLanes) {
        Vector x[kTaps];
        for (int t = 0; t < kTaps; ++t) x[t] = load(pixels + col + offsets[t]);
        for (int c = 0; c < kChannels; ++c) {
          const Vector gradient = load(dy + c * channel_size);
          for (int t = 0; t < kTaps; ++t) sum[c][t] += gradient * x[t];
        }
      }
    }
  }
  for (int c = 0; c < kChannels; ++c) {
    for (int t = 0; t < kTaps; ++t) sums[c * step + t] = sum[c][t];
  }
}

template <int kChannels>
void wgrad_channels(Count<kChannels>, const Group& group, const Taps& taps, const float* frames,
                    const float* dy, Vector* sums) {
  const Conv& conv = group.frame.conv;
  const int64_t step = conv.in_channels * taps.count;
  for (int64_t channel = 0; channel < conv.in_channels; ++channel) {
    in_tiles<kTileTaps>(0, taps.count, [&](auto tile, int64_t tap) {
      wgrad_tile<kChannels>(tile, group, taps.x + tap, frames, dy, sums + tap, step);
    });
    frames += group.frame.channel_size;
    sums += taps.count;
  }
}

int64_t wgrad_scratch(const Conv& conv) {
  const int64_t weights = conv.out_channels * conv.in_channels * conv.taps();
  // One vector more, to begin at a multiple of a vector's size.
  const Frame frame(conv);
  const Rows rows(conv);
  return (weights + 1) * kLanes + Group(frame, rows).images * (frame.size() + rows.size());
}

void wgrad(const Conv& conv, const float* x, const float* dy, float* gradient, int64_t images,
           float* scratch) {
  const Frame frame(conv);
  const Rows rows(conv);
  const Taps taps(frame, ConvWeight{});
  const int64_t weights = conv.out_channels * conv.in_channels * taps.count;
  memset(scratch, 0, wgrad_scratch(conv) * sizeof(float));
  const uintptr_t size = sizeof(Vector);
  Vector* const sums =
      reinterpret_cast<Vector*>((reinterpret_cast<uintptr_t>(scratch) + size - 1) / size * size);
  float* const frames = reinterpret_cast<float*>(sums + weights);
  Group group(frame, rows);
  const int64_t step = group.images;
  float* const upstream = frames + step * frame.size();
  for (int64_t first = 0; first < images; first += step) {
    group.images = minimum(step, images - first);
    for (int64_t i = 0; i < group.images; ++i) {
      frame.fill(frames + i * frame.size(), x + (first + i) * conv.in_channels * conv.in_pixels());
      rows.fill(upstream + i * rows.size(),
                dy + (first + i) * conv.out_channels * conv.out_pixels());
    }
    in_tiles<kWideTileChannels>(0, conv.out_channels, [&](auto channels, int64_t c) {
      wgrad_channels(channels, group, taps, frames, upstream + c * rows.channel_size,
                     sums + c * conv.in_channels * taps.count);
    });
  }
  for (int64_t i = 0; i < weights; ++i) {
    gradient[i] = sum<kLanes>(reinterpret_cast<const float*>(sums + i));
  }
}

}  // namespace

const ConvLoops conv_loops = {forward_scratch, wgrad_scratch, forward, wgrad};

}  // namespace SK_ISA
}  // namespace sorted_kernels
