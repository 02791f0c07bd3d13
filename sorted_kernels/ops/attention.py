"""Attention over the leading heads: schemas, fake kernels, autograd, public function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError
from sorted_kernels.ops.attention_checks import (
    active_heads,
    check_attention,
    check_counts,
    counts_of,
)
from sorted_kernels.ops.attention_dispatch import HEAD_DIMS, AttentionProblem
from sorted_kernels.ops.backend import attention_choice, implementation
from sorted_kernels.ops.checks import autocast
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.reference import attention as reference

LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? counts, bool causal,"
    " float scale) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? counts,"
    " Tensor out, Tensor lse, bool causal, float scale) -> (Tensor, Tensor, Tensor)"
)


def _module(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, counts: Tensor | None, causal: bool
) -> Any:
    """The module that runs an op."""
    triton = _kernel_chosen(q, k, v, mask, counts is not None, causal, False)
    return implementation("attention", q) if triton else reference


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    counts: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    module = _module(q, k, v, mask, counts, causal)
    counts = _usable(counts, q, k, module is reference)
    return module.attention(q, k, v, mask, counts, causal, scale)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    counts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _module(q, k, v, mask, counts, causal)
    counts = _usable(counts, q, k, module is reference)
    return module.attention_backward(dout, q, k, v, mask, counts, out, lse, causal, scale)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("attention", _attention, _device)
    LIBRARY.impl("attention_backward", _backward, _device)


@torch.library.register_fake("sorted_kernels::attention", lib=LIBRARY)
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    counts: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return reference.heads_last(q), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.register_fake("sorted_kernels::attention_backward", lib=LIBRARY)
def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    counts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(reference.heads_last(t) for t in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, counts, causal, scale = inputs
    ctx.save_for_backward(q, k, v, mask, counts, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.causal, ctx.scale = causal, scale


def _op_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, counts, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        each = None if counts is None else counts.tolist()
        found = _differentiable_backward(dy, (q, k, v), mask, each, ctx.causal, ctx.scale)
    else:
        found = torch.ops.sorted_kernels.attention_backward(
            dy, q, k, v, mask, counts, out, lse, ctx.causal, ctx.scale
        )
    return (*found, None, None, None, None)


torch.library.register_autograd(
    "sorted_kernels::attention", _op_backward, setup_context=_setup, lib=LIBRARY
)


def _differentiable_backward(
    dy: Tensor,
    inputs: tuple[Tensor, ...],
    mask: Tensor | None,
    counts: list[int] | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients as differentiable PyTorch, for double backward: all scores are computed again.

    Args:
        dy: (B, H, S, D).
        inputs: q, k and v; a fourth one stands for ``mask``.
        mask: As in :func:`attention`.
        counts: The heads of each sample, or None.
        causal: As in :func:`attention`.
        scale: As in :func:`attention`.
    """
    q, k, v, *rest = inputs
    mask = rest[0] if rest else mask

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return reference.exact(q, k, v, mask, causal, scale)[0]

    y = call(q, k, v, mask) if counts is None else reference.by_runs(call, q, k, v, mask, counts)
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(found) if t.requires_grad else None for t in inputs)


class _Upstream:
    """The gradient that reached an attention's output, in a backward that is recorded."""

    dy: Tensor | None = None

    def keep(self, dy: Tensor) -> None:
        if torch.is_grad_enabled():
            self.dy = dy


class _Entrance(Function):
    """The inputs as they are; in backward, PyTorch's gradients of them as they are.

    PyTorch's fused attention cannot be differentiated twice. So in a backward that is recorded
    (``create_graph=True``) its gradients are replaced by the same in differentiable PyTorch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        upstream: _Upstream,
        counts: list[int] | None,
        causal: bool,
        scale: float,
        mask: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(mask, *inputs)
        ctx.upstream, ctx.options = upstream, (counts, causal, scale)
        return tuple(t.view_as(t) for t in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            mask, *inputs = ctx.saved_tensors
            dy, ctx.upstream.dy = ctx.upstream.dy, None
            gradients = _differentiable_backward(dy, tuple(inputs), mask, *ctx.options)
        return (*[None] * 5, *gradients)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    counts: list[int] | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """PyTorch's attention, differentiable twice."""
    inputs = [q, k, v] if mask is None or not mask.requires_grad else [q, k, v, mask]
    if (
        is_compiling()
        or not torch.is_grad_enabled()
        or not any(t.requires_grad for t in inputs)
        or torch._C._are_functorch_transforms_active()
    ):
        return reference.attend(q, k, v, mask, counts, causal, scale)
    upstream = _Upstream()
    constant = mask if len(inputs) == 3 else None
    q, k, v, *rest = _Entrance.apply(upstream, counts, causal, scale, constant, *inputs)
    y = reference.attend(q, k, v, rest[0] if rest else constant, counts, causal, scale)
    y.register_hook(upstream.keep)
    return y


def _kernel_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    per_sample: bool,
    causal: bool,
    mask_trains: bool,
) -> bool:
    """Whether this project's kernel runs, and not PyTorch's."""
    fits = _concrete(HEAD_DIMS[0] <= q.shape[3] <= HEAD_DIMS[1])
    unit_strides = _concrete(q.stride(3) == k.stride(3) == v.stride(3) == 1)
    features = (fits, q.dtype, per_sample, causal, mask is not None, mask_trains, unit_strides)
    return _chosen(*features, q.device) == "triton"


def _concrete(condition: Any) -> bool:
    """A Python bool, where sizes are symbols because a graph is traced."""
    if condition:  # noqa: SIM103  (what decides is the branch)
        return True
    return False


def _chosen(*features_and_device: Any) -> str:
    *features, device = features_and_device
    return attention_choice(AttentionProblem(*features), device).backend


# What torch.compiler.assume_constant_result does, but it brings the whole compiler along.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _usable(counts: Tensor | None, q: Tensor, k: Tensor, by_host: bool) -> Tensor | None:
    """Counts where they are needed, checked if the host has them there or must read them anyway."""
    if counts is None:
        return None
    if by_host or counts.device.type == "cpu":
        counts_of(counts, q, k)
    return counts.to(q.device, non_blocking=True)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int | Tensor | None = None,
    num_kv_heads: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``softmax(scale * q @ k.T + mask) @ v`` over the leading heads.

    H / Hkv heads of q share one of k and v and are active together. Heads that are not active are
    neither read nor computed; the gradients of q, k and v are the ordinary full-size ones, zero
    there. Differentiable twice (not under ``torch.compile``).

    All samples with the same heads, PyTorch's attention runs on views of them. With a count for
    each sample the cost follows the sum of the counts: on a GPU in one launch of this project's
    kernel, if it may run, whose counts stay in the GPU's memory; elsewhere in one call for each run
    of neighbours with the same count (sort the batch), for which the host reads them.

    Args:
        q: (B, H, S, D). float32, bfloat16, float16 or float64.
        k: (B, Hkv, T, D), where Hkv divides H.
        v: (B, Hkv, T, D).
        num_heads: n, a multiple of H / Hkv from H / Hkv to H; H when not given. Or an int32 or
            int64 tensor (B,) of such counts. Counts in a GPU's memory that its kernel reads are
            not checked, which would wait for it, but rounded down and cut to 0..H.
        num_kv_heads: If given, n * Hkv / H; n follows from it.
        causal: Row i attends to columns 0..i: aligned at the top left where S and T differ, as
            ``is_causal`` of ``torch.nn.functional.scaled_dot_product_attention``.
        mask: Broadcasts to (B, H, S, T). Boolean (True: attend), or of q's dtype and added to the
            scores. Padding of keys is (B, 1, 1, T). A row that attends to nothing gives zeros, and
            has no part in any gradient. An additive mask gets a gradient if it wants one.
        scale: Of the scores; 1 / sqrt(D) when not given.

    Returns:
        (B, n, S, D); with counts (B, H, S, D), zero beyond a sample's heads.

    Raises:
        ShapeError: Shapes that do not fit, or a count that is not allowed.
        DTypeError: An unsupported dtype, or two that differ.
        DeviceError: Tensors on different devices.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = autocast(q), autocast(k), autocast(v)
        mask = mask if mask is None or mask.dtype is torch.bool else autocast(mask)
    check_attention(q, k, v, mask)
    if mask is not None:
        mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    counts = None
    if isinstance(num_heads, Tensor):
        counts = num_heads
        check_counts(counts, q, num_kv_heads)
    else:
        heads, kv_heads = active_heads(q, k, num_heads, num_kv_heads)
        if is_compiling() or heads != q.shape[1]:  # one graph for part and whole
            q, k, v = q[:, :heads], k[:, :kv_heads], v[:, :kv_heads]
            mask = mask if mask is None or mask.shape[1] == 1 else mask[:, :heads]
    trains = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    in_kernel = _kernel_chosen(q, k, v, mask, counts is not None, causal, trains)
    if in_kernel or (counts is not None and is_compiling()):  # graphs hold no counts of the host
        if trains:
            raise GradientError(
                "a mask with a gradient and a num_heads for each sample do not compile together"
            )
        return torch.ops.sorted_kernels.attention(q, k, v, mask, counts, causal, scale)[0]
    each = None if counts is None else counts_of(counts, q, k)
    return _attend(q, k, v, mask, each, causal, scale)
