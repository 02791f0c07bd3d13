// CPU registrations of convolutions of few channels in float32. The arguments are described in
// sorted_kernels/ops/narrow_conv2d.py.
#include "cpu/conv_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

namespace sorted_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Fewer multiplications than this are not worth a second thread.
constexpr int64_t kGrain = 1 << 18;
// The images of a gradient are summed in so many parts, whatever the number of threads, so that it
// is the same each time.
constexpr int64_t kParts = 8;

void check(const char* name, const Tensor& tensor, int64_t axes) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_cpu() && tensor.dim() == axes, name,
      " must be float32 on the CPU with ", axes, " axes");
}

ConvAxis axis_of(const Tensor& x, const Tensor& w, const Tensor& y,
                 const std::vector<int64_t>& walk, int64_t axis) {
  const int64_t i = axis - 2;
  const ConvAxis result{x.size(axis), y.size(axis), w.size(axis), walk[i],
                        walk[4 + i],  walk[2 + i],  walk[6 + i]};
  STD_TORCH_CHECK(result.stride >= 1 && result.dilation >= 1 && result.insert >= 1,
                  "stride, dilation and insert must be at least 1");
  STD_TORCH_CHECK(result.out >= 1, "the kernel reaches beyond x");
  STD_TORCH_CHECK(result.stride == 1 || result.insert == 1, "stride or insert must be 1");
  return result;
}

// w is the weight, or the view that takes its gradient: (Co, Ci, KH, KW).
Conv conv_of(const Tensor& x, const Tensor& w, const Tensor& y, const std::vector<int64_t>& walk) {
  check("x", x, 4);
  check("w", w, 4);
  check("y", y, 4);
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous(), "x and y must be contiguous");
  STD_TORCH_CHECK(walk.size() == 8, "walk has ", walk.size(), " integers; they are 8");
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(1) == w.size(1) && y.size(1) == w.size(0),
                  "x, w and y must be (N, Ci, H, W), (Co, Ci, KH, KW) and (N, Co, OH, OW)");
  const Conv conv{x.size(1), y.size(1), axis_of(x, w, y, walk, 2), axis_of(x, w, y, walk, 3)};
  STD_TORCH_CHECK(conv.taps() <= kMaxConvTaps, "the kernel has ", conv.taps(), " taps; at most ",
                  kMaxConvTaps, " are allowed");
  return conv;
}

int64_t multiplications(const Conv& conv) {
  return conv.in_channels * conv.out_channels * conv.taps() * conv.out_pixels();
}

const float* read(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* written(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void narrow_conv2d(Tensor x, Tensor w, std::optional<Tensor> bias, std::vector<int64_t> walk,
                   Tensor y, bool mirrored) {
  ConvWeight weight{read(w), w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
  if (mirrored) {  // inputs and outputs change places, and the last tap comes first
    weight.data += (w.size(2) - 1) * weight.row_stride + (w.size(3) - 1) * weight.col_stride;
    weight = {weight.data, weight.in_stride, weight.out_stride, -weight.row_stride,
              -weight.col_stride};
    w = torch::stable::transpose(w, 0, 1);
  }
  const Conv conv = conv_of(x, w, y, walk);
  const float* shift = nullptr;
  if (bias.has_value()) {
    check("bias", *bias, 1);
    STD_TORCH_CHECK(bias->size(0) >= conv.out_channels && bias->is_contiguous(),
                    "bias must have at least ", conv.out_channels, " elements side by side");
    shift = read(*bias);
  }
  const ConvLoops& loops = conv_loops(conv.cols.out);
  const int64_t in_size = conv.in_channels * conv.in_pixels();
  const int64_t out_size = conv.out_channels * conv.out_pixels();
  const float* from = read(x);
  float* to = written(y);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, multiplications(conv)));
  torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[loops.forward_scratch(conv)]);
    loops.forward(conv, from + begin * in_size, weight, shift, to + begin * out_size, end - begin,
                  scratch.get());
  });
}

void narrow_conv2d_wgrad(Tensor dy, Tensor x, std::vector<int64_t> walk, Tensor out,
                         bool accumulate) {
  const Conv conv = conv_of(x, out, dy, walk);
  const ConvLoops& loops = conv_loops(conv.cols.out);
  const int64_t images = x.size(0), parts = std::min(images, kParts);
  const int64_t weights = conv.in_channels * conv.out_channels * conv.taps();
  const int64_t in_size = conv.in_channels * conv.in_pixels();
  const int64_t out_size = conv.out_channels * conv.out_pixels();
  const float *inputs = read(x), *upstream = read(dy);
  std::vector<float> sums(parts * weights);
  const int64_t part =
      std::max<int64_t>(1, multiplications(conv) * images / std::max<int64_t>(1, parts));
  torch::stable::parallel_for(
      0, parts, std::max<int64_t>(1, kGrain / part), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> scratch(new float[loops.wgrad_scratch(conv)]);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = images * i / parts, last = images * (i + 1) / parts;
          loops.wgrad(conv, inputs + first * in_size, upstream + first * out_size,
                      sums.data() + i * weights, last - first, scratch.get());
        }
      });
  float* to = written(out);
  const float* sum = sums.data();
  for (int64_t o = 0; o < out.size(0); ++o) {
    for (int64_t c = 0; c < out.size(1); ++c) {
      for (int64_t row = 0; row < out.size(2); ++row) {
        for (int64_t col = 0; col < out.size(3); ++col, ++sum) {
          float& place =
              to[o * out.stride(0) + c * out.stride(1) + row * out.stride(2) + col * out.stride(3)];
          float total = accumulate ? place : 0;
          for (int64_t i = 0; i < parts; ++i) total += sum[i * weights];
          place = total;
        }
      }
    }
  }
}

}  // namespace
}  // namespace sorted_kernels

STABLE_TORCH_LIBRARY_IMPL(sorted_kernels, CPU, library) {
  library.impl("narrow_conv2d_", TORCH_BOX(&sorted_kernels::narrow_conv2d));
  library.impl("narrow_conv2d_wgrad_", TORCH_BOX(&sorted_kernels::narrow_conv2d_wgrad));
}
