#pragma once

#include <cuda_runtime.h>

namespace sorted_kernels {

inline int multiprocessors(int device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 1 ? count : 1;
}

}  // namespace sorted_kernels
