"""Convolution problems: shapes, blocks, and the oracle as sums over taps in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sorted_kernels as sk

from .oracle import Outcome, Parameters, _activate, outcome
from .poison import assert_same_bits

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


@dataclass(frozen=True)
class Conv:
    """A stored weight (M, K/groups, *kernel) and an active part of it.

    Args:
        full: M and K, stored channels out and in.
        active: Active channels out and in.
        kernel: Stored taps.
        taps: Active taps.
        size: Pixels of the input.
    """

    full: tuple[int, int] = (9, 7)
    active: tuple[int, int] = (5, 4)
    kernel: Any = 3
    taps: Any = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    size: tuple[int, int] = (7, 6)
    batch: int = 2
    bias: bool = True
    activation: str | None = None

    def change(self, **options) -> Conv:
        return replace(self, **options)

    @property
    def active_groups(self) -> int:
        return self.active[1] * self.groups // self.full[1] if self.groups > 1 else 1

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (self.full[0], self.full[1] // self.groups, *pair(self.kernel))

    @property
    def block_shape(self) -> tuple[int, ...]:
        per_group = self.active[1] if self.groups == 1 else self.full_shape[1]
        return (self.active[0], per_group, *pair(self.taps or self.kernel))

    @property
    def where(self) -> tuple[slice, ...]:
        """Where the block is in the stored weight."""
        cut = [slice(size) for size in self.block_shape[:2]]
        for full, size in zip(self.full_shape[2:], self.block_shape[2:], strict=True):
            cut.append(slice((full - size) // 2, (full - size) // 2 + size))
        return tuple(cut)

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def stored_padding(self) -> Any:
        """The padding of a layer that has this one where its kernel is cropped."""
        if self.taps is None or isinstance(self.padding, str):
            return self.padding
        cut, gaps = (self.kernel - self.taps) // 2, pair(self.dilation)
        return tuple(p + gap * cut for p, gap in zip(pair(self.padding), gaps, strict=True))

    def blocks(self, dtype: torch.dtype) -> Parameters:
        blocks = {"weight": torch.randn(self.block_shape).to(dtype)}
        return blocks | ({"bias": torch.randn(self.active[0]).to(dtype)} if self.bias else {})

    def parents(self, blocks: Parameters, fill: float = torch.nan) -> Parameters:
        """Stored parameters that are NaN outside the blocks."""
        parents = {}
        for name, block in blocks.items():
            shape = self.full_shape if name == "weight" else self.full[:1]
            parents[name] = torch.full(shape, fill, dtype=block.dtype)
            parents[name][self.part(name)] = block
        return parents

    def part(self, name: str) -> tuple[slice, ...]:
        return self.where if name == "weight" else self.where[:1]

    def input(self, dtype: torch.dtype, form: str = "contiguous") -> Tensor:
        x = torch.randn(self.batch, self.active[1], *self.size).to(dtype)
        return x.contiguous(memory_format=FORMATS[form])

    def upstream(self, x: Tensor) -> Tensor:
        """A random gradient of the output's shape, in x's memory format."""
        weight = torch.zeros(self.block_shape, dtype=x.dtype)
        return torch.randn_like(
            F.conv2d(x, weight, None, **self.options, groups=self.active_groups)
        )

    def ours(self, x: Tensor, p: Parameters) -> Tensor:
        return sk.conv2d(
            x, p["weight"], p.get("bias"), kernel_size=self.taps, groups=self.groups,
            out_channels=self.active[0], activation=self.activation, **self.options,
        )  # fmt: skip

    def plain(self, x: Tensor, p: Parameters) -> Tensor:
        z = F.conv2d(x, p["weight"], p.get("bias"), **self.options, groups=self.active_groups)
        return z if self.activation is None else getattr(F, self.activation)(z)

    def exact(self, x: Tensor, p: Parameters) -> Tensor:
        return _activate(taps_summed(x, p, self), self.activation)

    def judged(self, x: Tensor, blocks: Parameters, dy: Tensor) -> tuple[Outcome, Outcome]:
        """PyTorch's own on the blocks, and the oracle."""
        copies = {name: block.clone() for name, block in blocks.items()}
        plain = outcome(self.plain, x.clone(), copies, dy.clone())
        wide = {name: block.double() for name, block in blocks.items()}
        return plain, outcome(self.exact, x.double(), wide, dy.double())

    def layer(self, dtype: torch.dtype = torch.float32, **options) -> sk.nn.Conv2d:
        dims = {"out_dim": "o"} if self.groups == 1 else {}
        stored = {**self.options, "padding": self.stored_padding}
        layer = sk.nn.Conv2d(
            self.full[1], self.full[0], self.kernel, **stored, groups=self.groups,
            bias=self.bias, dtype=dtype, in_dim="i", activation=self.activation,
            kernel_size_dim="k" if self.taps else None, **dims, **options,
        )  # fmt: skip
        layer.dimensions = {"i": self.full[1]}
        sk.activate(layer, self.submodel)
        return layer

    @property
    def submodel(self) -> sk.Submodel:
        sizes = {"i": self.active[1]} | ({"o": self.active[0]} if self.groups == 1 else {})
        return sk.Submodel(**sizes, **({"k": self.taps} if self.taps else {}))


KINDS = {
    "dense": Conv(padding=1),
    "strided": Conv(kernel=(3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": Conv(dilation=(1, 2), padding=2),
    "same": Conv(kernel=(3, 5), padding="same"),
    "same-uneven": Conv(kernel=(2, 4), padding="same", dilation=(1, 3)),
    "valid": Conv(padding="valid", bias=False),
    "pointwise": Conv(kernel=1),
    "pointwise-strided": Conv(kernel=1, stride=2, padding=(0, 1)),
    "depthwise": Conv(full=(9, 9), active=(5, 5), groups=9, padding=1),
    "depthwise-multiplied": Conv(full=(18, 9), active=(10, 5), groups=9, stride=2),
    "grouped": Conv(full=(8, 12), active=(6, 9), groups=4, padding=1),
    "one-group": Conv(full=(8, 12), active=(2, 3), groups=4, padding=1),
    "cropped": Conv(kernel=7, taps=3, padding=1),
    "cropped-to-one": Conv(kernel=3, taps=1),
    "cropped-depthwise": Conv(
        full=(9, 9), active=(4, 4), groups=9, kernel=5, taps=3, padding=1, stride=(1, 2)
    ),
    "one-of-all": Conv(active=(1, 1), size=(1, 1), kernel=1, batch=1),
    "whole": Conv(active=(9, 7), padding=1),
    "odd": Conv(full=(33, 35), active=(31, 17), size=(11, 13), padding=1),
    "relu": Conv(padding=1, activation="relu"),
    "gelu": Conv(kernel=1, activation="gelu"),
    "silu": Conv(padding=1, activation="silu", bias=False),
    "no-images": Conv(padding=1, batch=0),
}


def taps_summed(x: Tensor, p: Parameters, conv: Conv) -> Tensor:
    """Convolution as the sum, over taps, of shifted pixels times the tap's matrix of channels."""
    w = p["weight"]
    (kh, kw), groups = w.shape[2:], conv.active_groups
    (sh, sw), (dh, dw) = pair(conv.stride), pair(conv.dilation)
    if conv.padding == "same":
        (top, bottom), (left, right) = (
            (gap * (tap - 1) // 2, gap * (tap - 1) - gap * (tap - 1) // 2)
            for gap, tap in ((dh, kh), (dw, kw))
        )
    else:
        top, left = (0, 0) if conv.padding == "valid" else pair(conv.padding)
        bottom, right = top, left
    x = F.pad(x, [left, right, top, bottom])
    rows = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    cols = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    x = x.unflatten(1, (groups, -1))
    matrices = w.unflatten(0, (groups, -1))
    y = 0
    for i in range(kh):
        for j in range(kw):
            shifted = x[:, :, :, i * dh :: sh, j * dw :: sw][..., :rows, :cols]
            y = y + torch.einsum("ngchw,goc->ngohw", shifted, matrices[..., i, j])
    y = y.flatten(1, 2)
    return y + p["bias"][:, None, None] if "bias" in p else y


def assert_zero_outside(conv: Conv, gradients: Parameters) -> None:
    for name, gradient in gradients.items():
        rest = gradient.clone()
        rest[conv.part(name)] = 0
        assert_same_bits(rest, torch.zeros_like(rest))
