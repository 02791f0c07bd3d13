// Function qualifiers that mean the same to nvcc and to a plain C++ compiler.
#pragma once

#if defined(__CUDACC__)
#define SK_INLINE __host__ __device__ __forceinline__
#define SK_UNROLL _Pragma("unroll")
#else
// Always inlined: the CPU loops are compiled once per instruction set, and the linker must never
// merge a copy that needs AVX into the portable one.
#define SK_INLINE inline __attribute__((always_inline))
#define SK_UNROLL
#endif
