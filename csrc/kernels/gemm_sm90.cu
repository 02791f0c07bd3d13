#include <cuda_runtime.h>

#include "kernels/gemm_launch.h"
#include "kernels/multiprocessors.cuh"
#include "kernels/sm90.cuh"
// After the instructions that it is made of.
#include "kernels/gemm_sm90.cuh"

namespace sorted_kernels {
namespace {

template <typename Gemm>
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                     const __grid_constant__ GemmParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  Gemm{&a, &b, params, shared, params.grid, params.count}.run();
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: the library loads where there is no driver.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

bool encode(CUtensorMap& map, const GemmOperand& operand, bool bf16, int lines) {
  const cuuint64_t sizes[2] = {cuuint64_t(operand.inner), cuuint64_t(operand.outer)};
  const cuuint64_t strides[1] = {cuuint64_t(operand.stride) * 2};
  const cuuint32_t box[2] = {kGemmTileRed, cuuint32_t(lines)}, steps[2] = {1, 1};
  const Encode encode = encoder();
  return encode != nullptr &&
         encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                const_cast<void*>(operand.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

struct Launcher {
  const GemmLaunch& launch;

  template <typename Gemm>
  const char* operator()() const {
    CUtensorMap a, b;
    if (!encode(a, launch.a, Gemm::kBf16, Gemm::kALines) ||
        !encode(b, launch.b, Gemm::kBf16, Gemm::kBLines)) {
      return "the driver makes no tensor map of these operands";
    }
    const auto kernel = gemm_sm90_kernel<Gemm>;
    const auto stream = static_cast<cudaStream_t>(launch.stream);
    const GemmParams& params = launch.params;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Gemm::kSharedBytes);
    kernel<<<launch.blocks, kGemmThreads, Gemm::kSharedBytes, stream>>>(a, b, params);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace

int gemm_blocks(const GemmParams& params, int device) {
  const int most = multiprocessors(device);
  return params.sizes != nullptr ? most : smaller(params.count, most);
}

const char* launch_gemm(const GemmLaunch& launch) {
  if (launch.slots > 0) {
    cudaMemsetAsync(launch.params.counters, 0, launch.slots * sizeof(int32_t),
                    static_cast<cudaStream_t>(launch.stream));
  }
  return with_gemm(launch.mode, launch.dtype, launch.out_dtype, launch.params.grid.tile_cols,
                   Launcher{launch});
}

}  // namespace sorted_kernels
