// What the bindings call to run the GEMM kernel; no CUDA header needed.
#pragma once

#include "common/optimizer_table.h"
#include "kernels/gemm_params.h"

namespace sorted_kernels {

// A matrix in device memory: `inner` contiguous elements a row, `outer` rows, `stride` elements
// apart. Address and stride are multiples of 16 bytes (a single row has no stride to speak of).
struct GemmOperand {
  const void* data;
  int64_t inner, outer, stride;
};

struct GemmLaunch {
  GemmMode mode;
  DType dtype;      // of the operands and the bias: bfloat16 or float16
  DType out_dtype;  // the same; float32 too for wgrad
  GemmOperand a, b;
  GemmParams params;
  int blocks;  // see gemm_blocks
  int slots;   // of the workspace, whose counters the launch clears
  int device;
  void* stream;
};

// Blocks to launch: one a multiprocessor, if there are tiles for all.
int gemm_blocks(const GemmParams& params, int device);

// Enqueues the kernel. Everything in device memory has to stay valid until it has run. Returns
// null, or what went wrong as a string that lives for ever.
const char* launch_gemm(const GemmLaunch& launch);

}  // namespace sorted_kernels
