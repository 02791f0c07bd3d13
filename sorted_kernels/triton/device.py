"""Device functions that all kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from sorted_kernels import env

# Triton's interpreter multiplies the bit patterns of bfloat16 operands, and truncates where the GPU
# rounds. The branches under this flag compute there what the GPU computes; no GPU code has them.
_INTERPRETED = tl.constexpr(env.triton_interpreter())


@triton.jit
def known_multiple(size, ALIGNED: tl.constexpr):
    """Tell the compiler that ``size`` is a multiple of 16, if the host checked that it is."""
    if ALIGNED:
        size = size // 16 * 16
    return size


@triton.jit
def within_widths(widths_ptr, rows, n_rows, cols, features, mask, ALIGNED: tl.constexpr):
    """Width of each row, and the part of ``mask`` that is within it; all of it without widths."""
    widths = features
    if widths_ptr is not None:
        widths = known_multiple(tl.load(widths_ptr + rows, mask=rows < n_rows, other=16), ALIGNED)
        mask = mask & (cols[None, :] < widths[:, None])
    return widths, mask


@triton.jit
def multiply_add(acc, a, b, PRECISION: tl.constexpr):
    """``acc + a @ b``, acc in float32."""
    if _INTERPRETED:
        # The product of two bfloat16 or float16 numbers is exact in float32.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(value, like_ptr):
    """``value``, in float32, rounded to nearest even in the type that ``like_ptr`` points to."""
    if _INTERPRETED and like_ptr.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -0x10000).to(tl.float32, bitcast=True)
    return value.to(like_ptr.dtype.element_ty)
