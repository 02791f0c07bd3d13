"""The products of a ragged linear on the CPU, compiled: float32, by PyTorch's own GEMM.

Twin of :mod:`sorted_kernels.reference.ragged`, where arguments and results are described. There
each box of the staircase is a call of its own, which all threads share; here one call has each
thread take boxes of its own (``csrc/host/ragged_boxes.h``), with the same FLOPs.

The op ``ragged_product_`` is private. ``product`` 0 is forward (a is x, b is W), 1 dgrad (a is dy,
b is W), 2 wgrad (a is dy, b is x). ``out`` needs no contents, unless wgrad shall accumulate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from sorted_kernels.ops.library import LIBRARY, NAMESPACE, load_compiled
from sorted_kernels.reference.linear import activate
from sorted_kernels.reference.ragged import ragged_bias_grad_into

__all__ = ["ragged_bias_grad_into", "ragged_dgrad", "ragged_linear", "ragged_wgrad_into"]
Runs = Sequence[tuple[int, int, int]]

LIBRARY.define(
    "ragged_product_(int product, Tensor a, Tensor b, Tensor? bias, int[] runs, Tensor(a!) out, "
    "bool accumulate) -> ()"
)
torch.library.register_fake(f"{NAMESPACE}::ragged_product_", lambda *args: None, lib=LIBRARY)
load_compiled()


def _run(
    product: int,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    runs: Runs,
    out: Tensor,
    accumulate: bool = False,
) -> None:
    flat = list(chain.from_iterable(runs))
    torch.ops.sorted_kernels.ragged_product_(product, a, b, bias, flat, out, accumulate)


def ragged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, runs: Runs, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``activation(x[r, :k_r] @ weight[:m_r, :k_r].T + bias[:m_r])`` for each row r."""
    z = x.new_empty((x.shape[0], runs[0][1]))
    _run(0, x, weight, bias, runs, z)
    saved = z if save and activation in ("gelu", "silu") else x.new_empty(0)
    return activate(z, activation), saved


def ragged_dgrad(dy: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """``dy[r, :m_r] @ weight[:m_r, :k_r]``: dy (N, at least the largest m) -> (N, largest k)."""
    dx = dy.new_empty((dy.shape[0], runs[0][2]))
    _run(1, dy, weight, None, runs, dx)
    return dx


def ragged_wgrad_into(dy: Tensor, x: Tensor, runs: Runs, out: Tensor, accumulate: bool) -> None:
    """``out[:m_r, :k_r] (+)= dy[r, :m_r].T x[r, :k_r]``, summed over the rows r."""
    _run(2, dy, x, None, runs, out, accumulate)
