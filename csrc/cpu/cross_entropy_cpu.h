// Cross-entropy of rows of logits on the CPU, one implementation per instruction set and type.
#pragma once

#include <cstdint>

#include "common/half_types.h"

namespace sorted_kernels {

struct CrossEntropyOptions {
  int64_t words;       // logits of a row, side by side
  int64_t row_stride;  // logits from row to row
  int64_t ignore_index;
  double label_smoothing;
  bool gradient;
};

template <typename T>
struct CrossEntropyLoops {
  // losses (rows,); with options.gradient, logits become what their gradient is times scale
  // (rows,; null for ones). Targets are words or ignore_index, whose rows get zeros.
  void (*rows)(T* logits, const int64_t* target, const float* scale, float* losses, int64_t rows,
               const CrossEntropyOptions& options);
  // total (rows, cols) = part (cols, rows) transposed, or += it. Strides are from row to row.
  void (*add_transposed)(float* total, int64_t total_stride, const T* part, int64_t part_stride,
                         int64_t rows, int64_t cols, bool accumulate);
};

struct AllCrossEntropyLoops {
  CrossEntropyLoops<float> of_float;
  CrossEntropyLoops<BFloat16> of_bfloat16;
  CrossEntropyLoops<Float16> of_float16;
};

namespace portable {
extern const AllCrossEntropyLoops cross_entropy_loops;
}
#if defined(SORTED_KERNELS_X86)
namespace avx2 {
extern const AllCrossEntropyLoops cross_entropy_loops;
}
namespace avx512 {
extern const AllCrossEntropyLoops cross_entropy_loops;
}
#endif

// The fastest loops that this processor can run.
const AllCrossEntropyLoops& cross_entropy_loops();

}  // namespace sorted_kernels
