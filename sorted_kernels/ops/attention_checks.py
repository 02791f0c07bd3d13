"""Argument checks of attention. Each error names argument, value and rule."""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.errors import DeviceError, DTypeError, ShapeError
from sorted_kernels.ops.checks import FLOATS, check_count

INTEGERS = (torch.int32, torch.int64)


def check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raise what ``attention`` documents of its tensors."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4 or t.shape[1] < 1 or t.shape[3] < 1:
            raise ShapeError(
                f"{name} has shape {tuple(t.shape)}; four axes are wanted, (batch, heads, rows, "
                "features), at least 1 head and 1 feature"
            )
        if t.dtype not in FLOATS:
            allowed = "float32, bfloat16, float16, float64"
            raise DTypeError(f"{name} has dtype {t.dtype}; allowed are {allowed}")
        if t.dtype != q.dtype:
            raise DTypeError(f"{name} has dtype {t.dtype}, q has {q.dtype}; they must agree")
        if t.device != q.device:
            raise DeviceError(f"{name} is on {t.device}, q on {q.device}")
    if k.shape != v.shape:
        raise ShapeError(f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; they must agree")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"k and v have shape {tuple(k.shape)}, q {tuple(q.shape)}; batch and features must "
            "agree, and q's heads be a multiple of theirs"
        )
    if mask is not None:
        _check_mask(mask, q, k)


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    if mask.dtype is not torch.bool and mask.dtype != q.dtype:
        raise DTypeError(f"mask has dtype {mask.dtype}; allowed are bool and q's, {q.dtype}")
    if mask.device != q.device:
        raise DeviceError(f"mask is on {mask.device}, q on {q.device}")
    full = (*q.shape[:3], k.shape[2])
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    fits = len(sizes) == 4 and all(size in (1, f) for size, f in zip(sizes, full, strict=True))
    if not fits:
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)}; it must broadcast to (batch, heads, rows, "
            f"columns), {full} (all heads, not the active ones)"
        )


def active_heads(
    q: Tensor, k: Tensor, num_heads: int | None, num_kv_heads: int | None
) -> tuple[int, int]:
    """How many heads of q, and of k and v, are active."""
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    if num_kv_heads is not None:
        check_count("num_kv_heads", num_kv_heads, kv_heads, "k's second axis")
    if num_heads is None:
        active = kv_heads if num_kv_heads is None else num_kv_heads
        return active * group, active
    check_count("num_heads", num_heads, heads, "q's second axis")
    if num_heads % group:
        raise ShapeError(
            f"num_heads={num_heads} is not a multiple of {group}: {group} heads of q share one of "
            "k and v, and are active together"
        )
    if num_kv_heads is not None and num_kv_heads * group != num_heads:
        raise ShapeError(
            f"num_kv_heads={num_kv_heads} disagrees with num_heads={num_heads}; with {group} heads "
            f"of q to one of k and v it is {num_heads // group}"
        )
    return num_heads, num_heads // group


def check_counts(counts: Tensor, q: Tensor, num_kv_heads: int | None) -> None:
    """What can be known of counts without reading them."""
    if num_kv_heads is not None:
        raise ShapeError(
            f"num_kv_heads={num_kv_heads} with a num_heads for each sample; leave it out, it "
            "follows"
        )
    if counts.dtype not in INTEGERS:
        raise DTypeError(f"num_heads has dtype {counts.dtype}; allowed are int32 and int64")
    if counts.shape != q.shape[:1]:
        raise ShapeError(
            f"num_heads has shape {tuple(counts.shape)}; one count a sample is ({q.shape[0]},)"
        )
    if counts.device != q.device and counts.device.type != "cpu":
        raise DeviceError(f"num_heads is on {counts.device}, q on {q.device}; allowed are q's, cpu")


def counts_of(counts: Tensor, q: Tensor, k: Tensor) -> list[int]:
    """The heads of each sample, read by the host and checked."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    each = counts.tolist()
    for sample, count in enumerate(each):
        if not 1 <= count <= heads or count % group:
            raise ShapeError(
                f"num_heads[{sample}]={count}; allowed are multiples of {group} (heads of q that "
                f"share one of k and v) in 1..{heads}"
            )
    return each
