#include "host/host_gemm.h"

#include <vector>

#include "host/sm90_shim.h"
// After the instructions that it is made of.
#include "kernels/gemm_sm90.cuh"

namespace sorted_kernels {
namespace {

sm90::TensorMap map_of(const GemmOperand& operand, int lines) {
  return {static_cast<const uint16_t*>(operand.data), operand.inner, operand.outer, operand.stride,
          lines};
}

struct HostRunner {
  GemmParams params;
  const GemmLaunch& launch;
  uint64_t seed;

  template <typename Gemm>
  void operator()() const {
    const sm90::TensorMap a = map_of(launch.a, Gemm::kALines), b = map_of(launch.b, Gemm::kBLines);
    for (int block = 0; block < launch.blocks; ++block) {
      sm90::run_block(block, launch.blocks, kGemmThreads, Gemm::kSharedBytes, seed + block, [&] {
        Gemm{&a, &b, params, sm90::shared_memory(), params.grid, params.count}.run();
      });
    }
  }
};

}  // namespace

void run_gemm_on_host(const GemmLaunch& launch, uint64_t seed) {
  std::vector<sm90::TensorMap> maps(2 * launch.blocks);
  HostRunner runner{launch.params, launch, seed};
  runner.params.maps = maps.data();
  with_gemm(launch.mode, launch.dtype, launch.out_dtype, launch.params.grid.tile_cols, runner);
}

}  // namespace sorted_kernels
