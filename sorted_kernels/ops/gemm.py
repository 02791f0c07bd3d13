"""The compiled GEMM's op. It is private: ``sorted_kernels.cuda`` plans its tiles and calls it.

``out[row, col] = epilogue(sum over red of a[row, red] * b[col, red])``; mode 0 is forward (a is x
(N, k), b is W (m, k)), 1 dgrad (a is dy (N, m), b is W (m, k)), 2 wgrad (a is dy (N, m), b is x
(N, k)). a and b are bfloat16 or float16, with addresses and row strides at multiples of 16 bytes;
their shapes are the extents beyond which nothing counts. ``out`` has the result's rows; columns
beyond the result's are padding and become zero (wgrad has none, and may be float32).

``tiles`` and ``runs`` are the int32 tables of a ragged product's schedule and ``slots`` its number
of partial tiles; a uniform product has neither. ``sizes`` is an int32 device tensor of the result's
rows and columns and the reduction, each at most that of the shapes: then the kernel reads them
when it runs. ``tile_cols`` is 128 or 256; ``split`` cuts the reduction; ``activation`` counts none,
relu, gelu, silu; ``saved`` receives what the activation saw.
"""

from __future__ import annotations

from sorted_kernels.ops.library import LIBRARY, load_compiled

LIBRARY.define(
    "native_gemm(int mode, Tensor a, Tensor b, Tensor? bias, Tensor(a!) out, Tensor(b!)? saved, "
    "Tensor? tiles, Tensor? runs, Tensor? sizes, int tile_cols, int split, int slots, "
    "int activation, bool accumulate) -> ()"
)
load_compiled()
