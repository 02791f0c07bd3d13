"""Attention over part of the heads, the same for all samples or each sample its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import sorted_kernels as sk
from bench import shapes
from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.shapes import AttentionShape


def _data(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v and an upstream gradient (B, H, S, D), as projections leave them."""
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.B, shape.S, shape.H, shape.D)
    tensors = [torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4)]
    for tensor in tensors:
        for sample, heads in enumerate(shape.counts()):
            tensor[sample, :, heads:] = 0
    return [tensor.transpose(1, 2) for tensor in tensors]


def _step(call: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor, heads: int) -> Contestant:
    """Forward and backward; the outcome is the gradients of the first heads."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        call(*leaves).backward(dy)

    return Contestant(step, lambda: [leaf.grad[:, :heads] for leaf in leaves])


def _sliced(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Contestant:
    """B0: PyTorch's attention on slices of the heads (on all of them for counts a sample)."""
    *leaves, dy = _data(shape, dtype, device)
    heads = max(shape.counts())
    return _step(
        lambda *qkv: F.scaled_dot_product_attention(*(t[:, :heads] for t in qkv)),
        leaves, dy[:, :heads], heads,
    )  # fmt: skip


def _separate(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Contestant:
    """B1: a call for each sample's heads."""
    *leaves, dy = _data(shape, dtype, device)
    counts = shape.counts()

    def call(*qkv: Tensor) -> Tensor:
        parts = []
        for sample, heads in enumerate(counts):
            own = (t[sample : sample + 1, :heads] for t in qkv)
            part = F.scaled_dot_product_attention(*own)
            parts.append(F.pad(part, (0, 0, 0, 0, 0, shape.H - heads)))
        return torch.cat(parts)

    return _step(call, leaves, dy, shape.H)


def _standalone(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Contestant:
    """B2: tensors that have no other heads."""
    *leaves, dy = _data(shape, dtype, device)
    heads = max(shape.counts())
    own = [t.transpose(1, 2)[:, :, :heads].clone().transpose(1, 2) for t in (*leaves, dy)]
    return _step(F.scaled_dot_product_attention, own[:3], own[3], heads)


def _ours(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Contestant:
    *leaves, dy = _data(shape, dtype, device)
    heads: int | Tensor
    if shape.submodels == 1:
        heads = shape.heads
        dy = dy[:, :heads]
    else:
        heads = torch.tensor(shape.counts(), device=device)
    call = partial(sk.attention, num_heads=heads)
    return _step(call, leaves, dy, max(shape.counts()))


def make_case(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Case:
    """All contestants on one shape."""
    gpu = device.type == "cuda"
    if shape.submodels == 1:
        builders = {"B2": _standalone, "B0": _sliced, "ours": _ours}
    else:  # "full" computes the inactive heads, too
        builders = {"B1": _separate, "full": _sliced, "ours": _ours}
    kernel = "attention" if shape.submodels == 1 else "attention_each"
    return Case(
        kernel=kernel,
        mode="forward+backward",
        sizes=str(shape),
        dtype=dtype,
        contestants={
            name: partial(build, shape, dtype, device) for name, build in builders.items()
        },
        device=device,
        flops=shape.flops,
        tolerance=1e-3 if dtype == torch.float32 else 5e-2,
        goals=goals_for(kernel, "forward+backward", {}, str(dtype), gpu),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Part of the heads, all, and each sample its own; bfloat16 on a GPU."""
    gpu = device.type == "cuda"
    chosen = shapes.ATTENTION_GPU if gpu else shapes.ATTENTION_CPU
    dtype = torch.bfloat16 if gpu else torch.float32
    return [
        make_case(shape, dtype, device) for shape in ([shapes.ATTENTION_QUICK] if quick else chosen)
    ]


def test_attention(case, provider, measure):
    measure(case, provider)
