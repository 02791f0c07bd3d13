"""Linear over the leading ``[:m, :k]`` block of a weight. Shapes: N rows, m out, k in features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu", "gelu", "silu")


def activate(z: Tensor, activation: str) -> Tensor:
    """Apply a named activation (``gelu`` is the exact one, with erf)."""
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "silu":
        return F.silu(z)
    return z


def activation_backward(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """Gradient before the activation; ``saved`` is the output for relu, else the input."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, saved, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, saved)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, saved)
    return dy


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``activation(x @ weight[:m, :k].T + bias[:m])``.

    Args:
        x: (..., k).
        weight: (M, K) parent, M >= m and K >= k, unit inner stride.
        bias: (M,) parent or None.
        out_features: m.
        activation: One of :data:`ACTIVATIONS`.
        save: Also return what :func:`activation_backward` needs.

    Returns:
        y (..., m), and the pre-activation (..., m) if ``save`` and the activation is gelu or silu,
        else an empty tensor.
    """
    view = weight.as_strided(
        (out_features, x.shape[-1]), (weight.stride(0), 1), weight.storage_offset()
    )
    z = F.linear(x, view, None if bias is None else bias[:out_features])
    if activation == "none":
        return z, x.new_empty(0)
    return activate(z, activation), z if save and activation != "relu" else x.new_empty(0)


def linear_dgrad(dy: Tensor, weight: Tensor, in_features: int) -> Tensor:
    """``dy @ weight[:m, :k]``: dy (..., m), weight (M, K) -> (..., k)."""
    view = weight.as_strided(
        (dy.shape[-1], in_features), (weight.stride(0), 1), weight.storage_offset()
    )
    return dy @ view


def linear_wgrad_into(dy: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= dy.T @ x``: dy (N, m), x (N, k), out (m, k), a view with unit inner stride."""
    if accumulate:
        out.addmm_(dy.t(), x)
    else:
        torch.mm(dy.t(), x, out=out)


def bias_grad_into(dy: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= dy.sum(0)``: dy (N, m), out (m,)."""
    if accumulate:
        out.add_(dy.sum(0))
    else:
        torch.sum(dy, 0, out=out)
