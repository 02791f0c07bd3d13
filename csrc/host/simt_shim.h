// Lets a plain C++ compiler build SIMT device code, and runs its blocks and threads one after the
// other on the CPU. Enough for kernels whose threads do not talk to each other: there is no shared
// memory and no barrier. Include it before any device code.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#error "the shim stands in for nvcc; nvcc must not see it"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))

namespace sorted_kernels {

struct SimtIndex {
  unsigned x = 0, y = 0, z = 0;
};

inline thread_local SimtIndex threadIdx, blockIdx, blockDim, gridDim;

// The host's stand-in for kernel<<<blocks, threads>>>(arguments...), in one dimension.
template <typename Kernel, typename... Arguments>
void run_grid(unsigned blocks, unsigned threads, Kernel kernel, const Arguments&... arguments) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
      kernel(arguments...);
    }
  }
}

}  // namespace sorted_kernels
