"""Norms over channels in three forms: ours on parents, torch's and the oracle on blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sorted_kernels as sk

from .poison import in_larger_buffer, transposed

EPS = 1e-3
# (N, C, c, spatial): odd and even, one channel, all of them, one sample, no spatial axes.
SIZES = [
    (5, 7, 3, ()),
    (4, 5, 1, (3,)),
    (2, 8, 8, (3, 5)),
    (3, 9, 6, (4, 4)),
    (1, 12, 10, (2, 3)),
    (2, 40, 33, (7, 1)),
    (9, 1, 1, (2, 1)),
]
Values = dict[str, Tensor]


def groups_of(c: int) -> int:
    """Some number of groups that divides c, neither 1 nor c where there is one."""
    return next((g for g in range(2, c) if c % g == 0), 1)


def _normal(x: Tensor, mean: Tensor, var: Tensor, p: Values) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (x - mean) / (var + EPS).sqrt()
    y = y * p["weight"].view(shape) if "weight" in p else y
    return y + p["bias"].view(shape) if "bias" in p else y


def exact_batch(x: Tensor, p: Values, training: bool) -> Tensor:
    axes, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    if not training:
        return _normal(x, p["mean"].view(shape), p["var"].view(shape), p)
    count = x.numel() // x.shape[1]
    mean = x.sum(axes, keepdim=True) / count
    return _normal(x, mean, (x - mean).pow(2).sum(axes, keepdim=True) / count, p)


def exact_group(x: Tensor, p: Values, groups: int) -> Tensor:
    rows = x.reshape(x.shape[0], groups, -1)
    mean = rows.sum(-1, keepdim=True) / rows.shape[-1]
    var = (rows - mean).pow(2).sum(-1, keepdim=True) / rows.shape[-1]
    wide = [value.expand_as(rows).reshape(x.shape) for value in (mean, var)]
    return _normal(x, *wide, p)


def affine(p: Values) -> Values:
    return {name: p[name] for name in ("weight", "bias") if name in p}


@dataclass(frozen=True)
class Norm:
    """One op. ``ours`` takes parents, ``plain`` (torch's own op) and ``exact`` take blocks."""

    name: str
    ours: Callable[[Tensor, Values], Tensor]
    plain: Callable[[Tensor, Values], Tensor]
    exact: Callable[[Tensor, Values], Tensor]
    layer: Callable[..., torch.nn.Module]
    names: tuple[str, ...] = ("weight", "bias")
    several: Callable[[Tensor], bool] = lambda x: x.numel() > x.shape[1]

    def __str__(self) -> str:
        return self.name


def _batch(training: bool, names: tuple[str, ...] = ("weight", "bias")) -> Norm:
    def ours(x: Tensor, p: Values) -> Tensor:
        statistics = (None, None) if training else (p["mean"], p["var"])
        return sk.batch_norm(x, *statistics, **affine(p), training=training, eps=EPS)

    def plain(x: Tensor, p: Values) -> Tensor:
        statistics = (None, None) if training else (p["mean"], p["var"])
        return F.batch_norm(x, *statistics, **affine(p), training=training, eps=EPS)

    def layer(C: int, c: int, dim: int, **options) -> torch.nn.Module:
        kind = sk.nn.BatchNorm2d if dim == 4 else sk.nn.BatchNorm1d
        made = kind(C, EPS, affine=bool(names), dim="i", **options).train(training)
        if names == ("weight",):
            made.register_parameter("bias", None)
        return made

    name = "-".join(("batch", "train" if training else "eval", *names))
    exact = lambda x, p: exact_batch(x, p, training)  # noqa: E731
    return Norm(name, ours, plain, exact, layer, names)


def _group(names: tuple[str, ...] = ("weight", "bias")) -> Norm:
    def ours(x: Tensor, p: Values) -> Tensor:
        return sk.group_norm(x, groups_of(x.shape[1]), **affine(p), eps=EPS)

    def plain(x: Tensor, p: Values) -> Tensor:
        return F.group_norm(x, groups_of(x.shape[1]), **affine(p), eps=EPS)

    def layer(C: int, c: int, dim: int, **options) -> torch.nn.Module:
        size = c // groups_of(c)
        whole = -(-C // size) * size
        return sk.nn.GroupNorm(whole // size, whole, EPS, bool(names), dim="i", **options)

    exact = lambda x, p: exact_group(x, p, groups_of(x.shape[1]))  # noqa: E731
    several = lambda x: x.numel() // groups_of(x.shape[1]) > 1  # noqa: E731
    return Norm("-".join(("group", *names)), ours, plain, exact, layer, names, several)


def _instance(names: tuple[str, ...] = ("weight", "bias")) -> Norm:
    def layer(C: int, c: int, dim: int, **options) -> torch.nn.Module:
        return sk.nn.InstanceNorm2d(C, EPS, affine=bool(names), dim="i", **options)

    return Norm(
        "-".join(("instance", *names)),
        lambda x, p: sk.instance_norm(x, **affine(p), eps=EPS),
        # Torch has two ops for it, whose rounding differs; ours is the one that is a group norm.
        lambda x, p: F.group_norm(x, x.shape[1], **affine(p), eps=EPS),
        lambda x, p: exact_group(x, p, x.shape[1]),
        layer,
        names,
        lambda x: x.shape[2:].numel() > 1,
    )


NORMS = [
    _batch(True),
    _batch(True, ("weight",)),
    _batch(True, ()),
    _batch(False),
    _batch(False, ("weight",)),
    _batch(False, ()),
    _group(),
    _group(()),
    _instance(),
    _instance(()),
]
TRAINED = [norm for norm in NORMS if norm.names]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
    "cut": in_larger_buffer,
    "transposed": transposed,
}


def values(norm: Norm, c: int, dtype: torch.dtype) -> Values:
    """Blocks of parameters, and of running statistics, as random as can be."""
    found = {name: torch.randn(c).to(dtype) for name in norm.names}
    return found | {"mean": torch.randn(c).to(dtype), "var": (torch.rand(c) + 0.3).to(dtype)}
