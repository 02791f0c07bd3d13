"""Attention for tests: the float64 definition written without this library, and its problems."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Sizes and rules of one attention; ``counts`` are heads, of all samples or of each."""

    name: str
    batch: int = 2
    heads: int = 6
    group: int = 1
    rows: int = 7
    cols: int = 7
    head_dim: int = 8
    counts: int | tuple[int, ...] | None = None
    mask: str | None = None
    causal: bool = False
    scale: float | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def each(self) -> list[int]:
        """Active heads of each sample."""
        if isinstance(self.counts, tuple):
            return list(self.counts)
        return [self.counts or self.heads] * self.batch

    @property
    def num_heads(self) -> int | Tensor | None:
        """As the public function takes it."""
        return torch.tensor(self.counts) if isinstance(self.counts, tuple) else self.counts

    @property
    def factor(self) -> float:
        return 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and an upstream gradient for all heads; q, k and v as projections leave them."""

        def projected(heads: int, rows: int) -> Tensor:
            flat = torch.randn(self.batch, rows, heads * self.head_dim)
            return flat.to(dtype).view(self.batch, rows, heads, self.head_dim).transpose(1, 2)

        kv = self.heads // self.group
        q, dy = projected(self.heads, self.rows), projected(self.heads, self.rows)
        return [q, projected(kv, self.cols), projected(kv, self.cols), dy]

    def make_mask(self, dtype: torch.dtype) -> Tensor | None:
        """The mask by its name; ``empty`` ones leave rows, and a whole sample, with nothing."""
        B, H, S, T = self.batch, self.heads, self.rows, self.cols
        if self.mask is None:
            return None
        if self.mask == "additive":
            return torch.randn(1, H, S, T).to(dtype)
        if self.mask == "additive-empty":
            mask = torch.randn(B, 1, S, T).to(dtype)
            mask[torch.rand(B, 1, S, T) < 0.3] = -torch.inf
            mask[:, :, S // 2] = -torch.inf
            return mask
        if self.mask == "padding":
            lengths = torch.arange(B) * T // B
            return (torch.arange(T) >= lengths[:, None]).view(B, 1, 1, T)
        if self.mask == "columns":  # one number a row, for all columns
            return torch.randn(S, 1).to(dtype)
        mask = torch.rand(B, H, S, T) < 0.6
        mask[..., 0] = True
        if self.mask == "bool-empty":
            mask[:, :, S // 2] = False
            mask[0] = False
        return mask


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: Problem) -> Tensor:
    """The definition, one sample and one head at a time."""
    out = torch.zeros_like(q)
    S, T = q.shape[2], k.shape[2]
    if mask is not None:
        mask = mask.expand(p.batch, p.heads, S, T)
    for b, heads in enumerate(p.each):
        for h in range(heads):
            s = q[b, h] @ k[b, h // p.group].T * p.factor
            allowed = torch.ones(S, T, dtype=torch.bool)
            if mask is not None and mask.dtype is torch.bool:
                allowed = allowed & mask[b, h]
            elif mask is not None:
                allowed = allowed & (mask[b, h] != -torch.inf)
                s = s + mask[b, h].masked_fill(mask[b, h] == -torch.inf, 0)
            if p.causal:
                allowed = allowed & (torch.arange(T) <= torch.arange(S)[:, None])
            some = allowed.any(1, keepdim=True)
            s = s.masked_fill(~allowed & some, -torch.inf)
            out[b, h] = torch.softmax(s, 1) @ v[b, h // p.group] * some
    return out


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: Problem) -> Tensor:
    """PyTorch's own attention in the same dtype, sample by sample on contiguous copies."""
    S, T = q.shape[2], k.shape[2]
    if mask is not None:
        mask = mask.expand(p.batch, p.heads, S, T)
    parts = []
    for b, heads in enumerate(p.each):
        own = None if mask is None else mask[b : b + 1, :heads].clone()
        if p.causal:
            allowed = torch.ones(S, T, dtype=torch.bool).tril()
            if own is None:
                own = allowed
            elif own.dtype is torch.bool:
                own = own & allowed
            else:
                own = own.masked_fill(~allowed, -torch.inf)
        kv = heads // p.group
        views = (q[b : b + 1, :heads], k[b : b + 1, :kv], v[b : b + 1, :kv])
        copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
        y = F.scaled_dot_product_attention(*copies, own, scale=p.factor, enable_gqa=p.group > 1)
        parts.append(F.pad(y, (0, 0, 0, 0, 0, p.heads - heads)))
    return torch.cat(parts)


def outcome(call, tensors: list[Tensor], mask: Tensor | None, p: Problem) -> list[Tensor]:
    """y, dq, dk and dv of ``call(q, k, v, mask, p)``; the upstream gradient comes last."""
    *inputs, dy = tensors
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = call(*leaves, mask, p)
    y.backward(dy[:, : y.shape[1]])
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def wide(tensor: Tensor | None) -> Tensor | None:
    """In float64; boolean masks stay."""
    return tensor if tensor is None or tensor.dtype is torch.bool else tensor.double()


def poison_inactive(tensors: list[Tensor], p: Problem) -> list[Tensor]:
    """Copies that are NaN in the heads that are not active, dy among them."""
    copies = [t.clone() for t in tensors]
    for b, heads in enumerate(p.each):
        for t, active in zip(copies, (heads, *[heads // p.group] * 2, heads), strict=True):
            t[b, active:] = torch.nan
    return copies


PROBLEMS = [
    Problem("plain"),
    Problem("one", batch=1, heads=1, rows=1, cols=1, head_dim=1),
    Problem("prefix", counts=4),
    Problem("first-head", counts=1, rows=9, cols=5),
    Problem("groups", group=2, counts=4, cols=11),
    Problem("one-kv-head", group=6, cols=3),
    Problem("causal", counts=5, causal=True, rows=33, cols=33),
    Problem("causal-tall", causal=True, rows=13, cols=6),
    Problem("causal-wide", causal=True, rows=6, cols=13),
    Problem("bool", mask="bool", counts=3),
    Problem("bool-empty", mask="bool-empty", group=3),
    Problem("additive", mask="additive", counts=2, scale=0.3),
    Problem("additive-empty", mask="additive-empty", group=2, counts=4, rows=5, cols=17),
    Problem("padding", batch=3, mask="padding", counts=5),
    Problem("columns", mask="columns"),
    Problem("causal-padding", batch=3, mask="padding", causal=True, group=2),
    Problem("causal-additive", mask="additive", causal=True, counts=4),
    Problem("each", batch=4, counts=(6, 2, 2, 1)),
    Problem("each-unsorted", batch=4, counts=(1, 6, 1, 3), rows=9, cols=31),
    Problem("each-same", batch=3, counts=(4, 4, 4), causal=True),
    Problem("each-groups", batch=3, group=2, counts=(2, 6, 4), mask="bool-empty"),
    Problem("each-causal", batch=3, group=3, counts=(6, 3, 3), causal=True, mask="additive"),
    Problem("each-padding", batch=3, counts=(6, 5, 1), causal=True, mask="padding"),
]
