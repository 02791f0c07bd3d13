"""Attention over the leading heads. Shapes: q (B, H, S, D); k and v (B, Hkv, T, D).

Head h of q meets head ``h // (H / Hkv)`` of k and v. ``mask`` is None, or boolean (True: attend) or
additive, (B or 1, H or 1, S or 1, T or 1). ``causal`` lets row i attend to columns up to i (aligned
at the top left, whatever S and T are, as ``is_causal`` of PyTorch's attention). A row that attends
to nothing is zero. ``counts`` are the heads of each sample, multiples of H / Hkv; neighbours with
the same count go together, and heads beyond a sample's count are neither read nor computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def runs_of(counts: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Neighbouring samples with the same number of heads, and that number."""
    begin = 0
    for heads, samples in itertools.groupby(counts):
        end = begin + len(list(samples))
        yield slice(begin, end), heads
        begin = end


def _views(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, counts: Sequence[int]
) -> Iterator[tuple[slice, int, tuple[Tensor, Tensor, Tensor, Tensor | None]]]:
    """Each run's samples, its number of heads, and views of those."""
    group = q.shape[1] // k.shape[1]
    runs = list(runs_of(counts))
    sizes = [samples.stop - samples.start for samples, _ in runs]
    # Split, not sliced: the gradient of each slice would be as large as the whole batch.
    parts = [t.split(sizes) for t in (q, k, v)] if runs else [[], [], []]
    for (samples, heads), *each in zip(runs, *parts, strict=True):
        own = mask
        if own is not None:
            own = own if own.shape[0] == 1 else own[samples]
            own = own if own.shape[1] == 1 else own[:, :heads]
        own_q, own_k, own_v = each
        kv_heads = heads // group
        yield samples, heads, (own_q[:, :heads], own_k[:, :kv_heads], own_v[:, :kv_heads], own)


def heads_last(like: Tensor) -> Tensor:
    """An empty (B, H, S, D) whose rows of all heads are neighbours, as projections want them."""
    batch, heads, rows, head_dim = like.shape
    return like.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    counts: Sequence[int] | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """PyTorch's own attention on views of the active heads: (B, H, S, D).

    With ``counts``, one call for each run of neighbours with the same count.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _library(q, k, v, mask, causal, scale)

    return call(q, k, v, mask) if counts is None else by_runs(call, q, k, v, mask, counts)


def by_runs(
    call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, counts: Sequence[int]
) -> Tensor:
    """What ``call`` makes of each run's heads, zero in the heads beyond them."""
    parts = []
    for _, heads, views in _views(q, k, v, mask, counts):
        part = call(*views)
        parts.append(F.pad(part, (0, 0, 0, 0, 0, q.shape[1] - heads)))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def _library(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    empty = None
    if mask is not None:
        if causal:  # not every back end of PyTorch takes both
            mask, causal = with_causal(mask, q.shape[2], k.shape[2]), False
        if not q.is_cpu:
            mask, empty = without_empty_rows(mask)
    options = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, **options)
    return y if empty is None else y.masked_fill(empty, 0)


def with_causal(mask: Tensor, rows: int, cols: int) -> Tensor:
    """A mask with the causal rule in it, which has all S rows and T columns."""
    allowed = torch.ones(rows, cols, dtype=torch.bool, device=mask.device).tril()
    return mask & allowed if mask.dtype is torch.bool else mask.masked_fill(~allowed, -torch.inf)


def without_empty_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask in which every row attends to something, and which rows did not (..., 1).

    PyTorch's CPU kernels give zeros for a row that attends to nothing. What the others give,
    in gradients too, differs between them; such a row attends to everything there, and its result
    is thrown away.
    """
    if mask.dtype is torch.bool:
        empty = ~mask.any(-1, keepdim=True)
        return mask | empty, empty
    empty = (mask == -torch.inf).all(-1, keepdim=True)
    return mask.masked_fill(empty, 0), empty


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, with every score written down; differentiable any number of times.

    Returns:
        (B, H, S, D) in q's dtype, and the logarithm of each row's sum of exponentials (B, H, S) in
        at least float32, -inf for a row that attends to nothing.
    """
    s, values = _scores(q, k, mask, causal, scale), _wide(v).unsqueeze(2)
    highest = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    weights = torch.exp(s - highest)
    total = weights.sum(-1, keepdim=True)
    y = (weights / total.masked_fill(total == 0, 1)) @ values
    lse = (highest + total.log()).squeeze(-1)
    return y.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """(B, Hkv, H / Hkv, S, T)."""
    grouped = _wide(q).unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    s = grouped @ _wide(k).unsqueeze(2).transpose(-1, -2) * scale
    if causal:
        allowed = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~allowed, -torch.inf)
    if mask is None:
        return s
    mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, s.shape[1:3])
    return s.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else s + mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    counts: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Twin of the Triton forward: :func:`exact` for each run of samples.

    Args:
        q: (B, H, S, D).
        k: (B, Hkv, T, D).
        v: (B, Hkv, T, D).
        mask: None or (B or 1, H or 1, S or 1, T or 1).
        counts: (B,) integers, the heads of each sample; None for all heads.
        causal: Whether row i attends to columns up to i only.
        scale: Of the scores.

    Returns:
        (B, H, S, D) with strides as of :func:`heads_last`, zero beyond a sample's heads; and the
        logarithms of sums (B, H, S) in at least float32, -inf there.
    """
    out = heads_last(q).zero_()
    lse = _wide(q.new_empty(0)).new_full(q.shape[:3], -torch.inf)
    for samples, heads, mine in _views(q, k, v, mask, _each(q, counts)):
        out[samples, :heads], lse[samples, :heads] = exact(*mine, causal, scale)
    return out, lse


def attention_backward(
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
    """Gradients of q, k and v, zero beyond a sample's heads; strides as of :func:`heads_last`.

    Arguments are those of :func:`attention`, its results, and ``dout`` (B, H, S, D). Formulas:
    FlashAttention (Dao et al., 2022), appendix B.2.
    """
    dq, dk, dv = (heads_last(t).zero_() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for samples, heads, (own_q, own_k, own_v, own_mask) in _views(q, k, v, mask, _each(q, counts)):
        kv_heads = heads // group
        split = (kv_heads, group)
        dy = _wide(dout[samples, :heads]).unflatten(1, split)
        y = _wide(out[samples, :heads]).unflatten(1, split)
        own_lse = lse[samples, :heads].unflatten(1, split).unsqueeze(-1)
        scores = _scores(own_q, own_k, own_mask, causal, scale)
        p = torch.exp(scores - own_lse.masked_fill(own_lse == -torch.inf, 0))
        dp = dy @ _wide(own_v).unsqueeze(2).transpose(-1, -2)
        ds = p * (dp - (dy * y).sum(-1, keepdim=True)) * scale
        dq[samples, :heads] = (ds @ _wide(own_k).unsqueeze(2)).flatten(1, 2).to(q.dtype)
        grouped = _wide(own_q).unflatten(1, split)
        dk[samples, :kv_heads] = (ds.transpose(-1, -2) @ grouped).sum(2).to(k.dtype)
        dv[samples, :kv_heads] = (p.transpose(-1, -2) @ dy).sum(2).to(v.dtype)
    return dq, dk, dv


def _each(q: Tensor, counts: Tensor | None) -> list[int]:
    return [q.shape[1]] * q.shape[0] if counts is None else counts.tolist()
