"""Linear over the leading ``[:m, :k]`` block of a weight. Shapes: N rows, m out, k in features.

Twin of :mod:`sorted_kernels.reference.linear`, where arguments and results are described, for
bfloat16 and float16 on sm_90; gradients of the weight may be float32. The kernel reads the parents
in place; their addresses and row strides have to be multiples of 16 bytes. Sums are float32, and
results the same each time.

Outputs are dense, whatever their width, as every user of a tensor expects (``view``, a compiled
graph, the next operation). Padded rows would not survive the first elementwise operation: PyTorch
gives its result dense rows. So the kernel stores odd rows an element at a time, and activations
whose rows TMA cannot address are copied into rows that it can: one pass over an activation, against
a product of hundreds of operations an element. What is aligned, padded by its owner too, is read in
place.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sorted_kernels.cuda.gemm import ROW_STEP, Runs, run_gemm
from sorted_kernels.reference.linear import activate, activation_backward, bias_grad_into
from sorted_kernels.reference.ragged import ragged_bias_grad_into

__all__ = [
    "activate",
    "activation_backward",
    "bias_grad_into",
    "linear",
    "linear_dgrad",
    "linear_wgrad_into",
    "ragged_bias_grad_into",
    "ragged_dgrad",
    "ragged_linear",
    "ragged_wgrad_into",
]


def _rows(x: Tensor, cols: int) -> Tensor:
    """Leading columns of activations (..., c) as rows that TMA can address: a view, or a copy."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    count, stored = rows.shape
    dense = cols == 1 or rows.stride(1) == 1
    apart = count == 1 or (rows.stride(0) % ROW_STEP == 0 and rows.stride(0) >= cols)
    if dense and apart and rows.data_ptr() % 16 == 0:
        return rows if stored == cols else rows[:, :cols]
    padded = rows.new_empty((count, -(-cols // ROW_STEP) * ROW_STEP))
    return padded[:, :cols].copy_(rows[:, :cols])


def _output(like: Tensor, columns: int, runs: Runs) -> Tensor:
    """Rows of ``like``; zeros where a ragged product leaves tiles out."""
    shape = (*like.shape[:-1], columns)
    return like.new_zeros(shape) if len(runs) > 1 else like.new_empty(shape)


def _runs(runs: Sequence[tuple[int, int, int]]) -> Runs:
    return tuple((rows, m, k) for rows, m, k in runs)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, runs: Runs, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    _, m, k = runs[0]
    y = _output(x, m, runs)
    z = _output(x, m, runs) if save and activation in ("gelu", "silu") else None
    if x.numel() > 0:
        run_gemm(
            "forward", _rows(x, k), weight[:m, :k], y.view(-1, m), runs, bias=bias,
            saved=None if z is None else z.view(-1, m), activation=activation,
        )  # fmt: skip
    return y, x.new_empty(0) if z is None else z


def _dgrad(dy: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    _, m, k = runs[0]
    dx = _output(dy, k, runs)
    if dy.numel() > 0:
        run_gemm("dgrad", _rows(dy, m), weight[:m, :k], dx.view(-1, k), runs)
    return dx


def _wgrad_into(dy: Tensor, x: Tensor, runs: Runs, out: Tensor, accumulate: bool) -> None:
    _, m, k = runs[0]
    if dy.numel() > 0:
        a, b = _rows(dy, m), _rows(x, k)
        run_gemm("wgrad", a, b, out[:m, :k], runs, accumulate=accumulate)
    elif not accumulate:
        out[:m, :k].zero_()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``activation(x @ weight[:m, :k].T + bias[:m])``; see the reference.

    Args:
        x: (..., k).
        weight: (M, K) parent, M >= m and K >= k, unit inner stride.
        bias: (M,) parent or None.
        out_features: m.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``; fused.
        save: Also return the pre-activation of gelu and silu.

    Returns:
        y (..., m), and the pre-activation (..., m) or an empty tensor.

    Raises:
        DeviceError, DTypeError, StrideError: What :func:`~sorted_kernels.cuda.gemm.supports`
            says no to, of the weight.
    """
    runs = ((x.numel() // x.shape[-1], out_features, x.shape[-1]),)
    return _forward(x, weight, bias, runs, activation, save)


def linear_dgrad(dy: Tensor, weight: Tensor, in_features: int) -> Tensor:
    """``dy @ weight[:m, :k]``: dy (..., m), weight (M, K) -> (..., k)."""
    return _dgrad(dy, weight, ((dy.numel() // dy.shape[-1], dy.shape[-1], in_features),))


def linear_wgrad_into(dy: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= dy.T @ x``: dy (N, m), x (N, k), out (m, k), a view with unit inner stride."""
    runs = ((dy.numel() // dy.shape[-1], dy.shape[-1], x.shape[-1]),)
    _wgrad_into(dy, x, runs, out, accumulate)


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: Sequence[tuple[int, int, int]],
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`linear` of a batch whose rows use different prefixes of the weight.

    Args:
        x: (N, K_max); what a row holds past its own size does not matter.
        weight: (M, K) parent.
        bias: (M,) parent or None.
        runs: ``(rows, out_features, in_features)`` triples, sorted largest first in both sizes.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``.
        save: Also return the pre-activation of gelu and silu.

    Returns:
        y (N, m_max), zero past each row's size, and the pre-activation or an empty tensor.
    """
    return _forward(x, weight, bias, _runs(runs), activation, save)


def ragged_dgrad(dy: Tensor, weight: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return dx (N, k_max), zero past each row's size, from dy (N, m_max) and weight (M, K)."""
    return _dgrad(dy, weight, _runs(runs))


def ragged_wgrad_into(
    dy: Tensor, x: Tensor, runs: Sequence[tuple[int, int, int]], out: Tensor, accumulate: bool
) -> None:
    """``out[i, j] (+)= sum of dy[r, i] * x[r, j]`` over the rows r that use it.

    Args:
        dy: (N, m_max).
        x: (N, k_max).
        runs: As for :func:`ragged_linear`.
        out: (m_max, k_max) or larger; nothing beyond is touched.
        accumulate: Add to what is there.
    """
    _wgrad_into(dy, x, _runs(runs), out, accumulate)
