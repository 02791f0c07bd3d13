// Convolutions of few channels on the CPU, one implementation per instruction set.
//
// Libraries compute in blocks of 16 channels or so and copy the weight, the activations or both
// into that form: a slice of 4 channels costs them what 16 do. Here vectors run along the pixels of
// a row, so that cost follows the channels, and the weight is read where it lies, with any strides.
#pragma once

#include <cstdint>

namespace sorted_kernels {

constexpr int64_t kMaxConvTaps = 64;

// One axis of a convolution. Pixel i of the input is pixel i * insert + pad of the padded one,
// whose other pixels are zero; output o and tap t meet at its pixel o * stride + t * dilation. A
// negative pad drops pixels. insert is 1 but in the gradient of an input that was walked over with
// a stride.
struct ConvAxis {
  int64_t in, out, kernel, stride, dilation, pad, insert;

  int64_t padded() const { return (out - 1) * stride + (kernel - 1) * dilation + 1; }
};

// Sizes of one image's convolution: x (in_channels, rows.in, cols.in) to
// y (out_channels, rows.out, cols.out), both dense.
struct Conv {
  int64_t in_channels, out_channels;
  ConvAxis rows, cols;

  int64_t taps() const { return rows.kernel * cols.kernel; }
  int64_t in_pixels() const { return rows.in * cols.in; }
  int64_t out_pixels() const { return rows.out * cols.out; }
};

// A weight (out_channels, in_channels, rows.kernel, cols.kernel): its first element, and its
// strides.
struct ConvWeight {
  const float* data;
  int64_t out_stride, in_stride, row_stride, col_stride;
};

struct ConvLoops {
  // Floats of scratch memory, with any contents, that a thread's call below needs.
  int64_t (*forward_scratch)(const Conv& conv);
  int64_t (*wgrad_scratch)(const Conv& conv);
  // y = conv(x, weight) + bias for `images` images; bias may be null.
  void (*forward)(const Conv& conv, const float* x, ConvWeight weight, const float* bias, float* y,
                  int64_t images, float* scratch);
  // gradient (out_channels, in_channels, taps; dense) = that of the weight, summed over the images.
  void (*wgrad)(const Conv& conv, const float* x, const float* dy, float* gradient, int64_t images,
                float* scratch);
};

namespace portable {
extern const ConvLoops conv_loops;
}
#if defined(SORTED_KERNELS_X86)
namespace avx2 {
extern const ConvLoops conv_loops;
}
namespace avx512 {
extern const ConvLoops conv_loops;
}
#endif

// The fastest loops that this processor can run for rows of so many pixels.
const ConvLoops& conv_loops(int64_t out_cols);

}  // namespace sorted_kernels
