// The tensor cores' asynchronous product of one warpgroup: d[64, N] += a[64, 16] * b[N, 16]^T, with
// a and b in shared memory behind descriptors (PTX ISA, "Asynchronous warpgroup level matrix
// instructions"). Trans: the operand's rows, not its reduction, are contiguous.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/half_types.h"

#define SK_4(C, d, i) C(d[(i)]), C(d[(i) + 1]), C(d[(i) + 2]), C(d[(i) + 3])
#define SK_16(C, d, i) SK_4(C, d, i), SK_4(C, d, (i) + 4), SK_4(C, d, (i) + 8), SK_4(C, d, (i) + 12)

// The last three numbers: add to d, and negate neither operand.
#define SK_WGMMA_128(TYPE)                                                                         \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                        \
               " {"                                                                                \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
               "%64, %65, 1, 1, 1, %66, %67;\n"                                                    \
               : SK_16("+f", d, 0), SK_16("+f", d, 16), SK_16("+f", d, 32), SK_16("+f", d, 48)     \
               : "l"(a), "l"(b), "n"(kTransA), "n"(kTransB))

#define SK_WGMMA_256(TYPE)                                                                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                       \
               " {"                                                                               \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
               "%110, %111, "                                                                     \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
               "%125, %126, %127}, "                                                              \
               "%128, %129, 1, 1, 1, %130, %131;\n"                                               \
               : SK_16("+f", d, 0), SK_16("+f", d, 16), SK_16("+f", d, 32), SK_16("+f", d, 48),   \
                 SK_16("+f", d, 64), SK_16("+f", d, 80), SK_16("+f", d, 96), SK_16("+f", d, 112)  \
               : "l"(a), "l"(b), "n"(kTransA), "n"(kTransB))

namespace sorted_kernels::sm90 {

template <typename T, int kTransA, int kTransB, int kAccumulators>
__device__ __forceinline__ void wgmma(float (&d)[kAccumulators], uint64_t a, uint64_t b) {
  static_assert(kAccumulators == 64 || kAccumulators == 128);
  constexpr bool kBf16 = std::is_same_v<T, BFloat16>;
  if constexpr (kAccumulators == 64) {
    if constexpr (kBf16) {
      SK_WGMMA_128("bf16");
    } else {
      SK_WGMMA_128("f16");
    }
  } else {
    if constexpr (kBf16) {
      SK_WGMMA_256("bf16");
    } else {
      SK_WGMMA_256("f16");
    }
  }
}

}  // namespace sorted_kernels::sm90

#undef SK_WGMMA_128
#undef SK_WGMMA_256
#undef SK_16
#undef SK_4
