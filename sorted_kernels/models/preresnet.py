"""cPreResNet20 in plain PyTorch, and the rules that make its width elastic."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError
from sorted_kernels.models.elasticize import elasticize

WIDTHS = 16
"""Full size of the dimension ``width``: 4, 8, 12 and 16 are 25, 50, 75 and 100 percent."""

_NORMS: dict[str, Callable[[int], torch.nn.Module]] = {
    "batch": torch.nn.BatchNorm2d,
    "instance": partial(torch.nn.InstanceNorm2d, affine=True),
}


class PreActivationBlock(torch.nn.Module):
    """A residual block of which each convolution comes after a norm and a ReLU (He et al., 2016).

    Args:
        channels: Channels in, between the convolutions, and out: one number more than there are
            convolutions.
        kernels: Side of each convolution's kernel.
        stride: Of the first convolution whose kernel is 3.
        norm: Makes the norm of so many channels.

    Attributes:
        shortcut: A 1x1 convolution of the block's input where the shape changes, else None.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        kernels: tuple[int, ...],
        stride: int,
        norm: Callable[[int], torch.nn.Module],
    ) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(norm(count) for count in channels[:-1])
        self.convs = torch.nn.ModuleList()
        strides = [stride if i == kernels.index(3) else 1 for i in range(len(kernels))]
        for i, kernel in enumerate(kernels):
            self.convs.append(_conv(channels[i], channels[i + 1], kernel, strides[i]))
        changes = stride != 1 or channels[0] != channels[-1]
        self.shortcut = _conv(channels[0], channels[-1], 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, channels out, height / stride, width / stride)."""
        out = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            out = conv(torch.relu(norm(out)))
        return out + (x if self.shortcut is None else self.shortcut(x))


class CPreResNet20(torch.nn.Module):
    """A pre-activation residual network of 20 layers for small images: nothing but ``torch.nn``.

    The name is that of the network in the comparisons of LCS (Nunez et al., 2023) and SortedNet.
    The papers print no layout. LCS' public code takes it from filter-pruning work, where a *c*
    stands for configurable channels: a 3x3 stem of 16 channels and three stages (strides 1, 2, 2)
    of two bottleneck blocks (1x1, 3x3, 1x1; 16, 32, 64 channels inside, four times as many
    outside), the shortcut a 1x1 convolution of the raw input where the shape changes, a last norm,
    average pooling, a classifier: ``block="bottleneck"``. (SortedNet's Table 2 gives it 301 MFLOPs,
    which this has not, and from which no layout can be told.) ``block="basic"``, the default, is
    He et al.'s plain one: three stages of three blocks of two 3x3 convolutions with 16, 32 and 64
    channels. In both the proportions of the channels are constant: a width of w/16 has w/16 of
    every layer's channels.

    Convolutions have no bias and start from He's normal distribution over the outputs, norms as in
    PyTorch (LCS starts their scales at 0.5).

    Args:
        in_channels: Channels of the images.
        classes: Number of outputs.
        norm: ``"batch"`` or ``"instance"`` (with scale and shift, without running statistics).
        block: ``"basic"`` or ``"bottleneck"``.
        width: Channels of the stem, 1 to 16: below 16, every layer has so many sixteenths.

    Attributes:
        dimensions: Full size of the dimension ``width`` that the rules make elastic.

    Raises:
        OptionError: Another norm, block or width.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        norm: str = "batch",
        block: str = "basic",
        width: int = WIDTHS,
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            raise OptionError(f"norm is {norm!r}; allowed are {', '.join(map(repr, _NORMS))}")
        if block not in ("basic", "bottleneck"):
            raise OptionError(f"block is {block!r}; allowed are 'basic' and 'bottleneck'")
        if width not in range(1, WIDTHS + 1):
            raise OptionError(f"width is {width!r}; allowed are 1 to {WIDTHS}")
        self.dimensions = {"width": width}
        bottleneck = block == "bottleneck"
        self.stem = _conv(in_channels, width, 3, 1)
        self.blocks = torch.nn.ModuleList()
        before = width
        for inner, first_stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            outer = 4 * inner if bottleneck else inner
            for index in range(2 if bottleneck else 3):
                channels = (before, inner, inner, outer) if bottleneck else (before, inner, outer)
                kernels = (1, 3, 1) if bottleneck else (3, 3)
                stride = first_stride if index == 0 else 1
                self.blocks.append(PreActivationBlock(channels, kernels, stride, _NORMS[norm]))
                before = outer
        self.norm = _NORMS[norm](before)
        self.head = torch.nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, height, width) -> (n, classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(self.norm(x)).mean(dim=(2, 3)))


CPRERESNET_RULES = {
    "stem": {"out": "width"},
    "blocks.*.norms.*": {"features": "width"},
    "blocks.*.convs.*": {"in": "width", "out": "width"},
    "blocks.*.shortcut": {"in": "width", "out": "width"},
    "norm": {"features": "width"},
    "head": {"in": "width"},
}


def elastic_cpreresnet20(
    in_channels: int = 3,
    classes: int = 10,
    norm: str = "batch",
    block: str = "basic",
    width: int = WIDTHS,
) -> torch.nn.Module:
    """A :class:`CPreResNet20` with the elastic dimension ``width``; the arguments are its."""
    return elasticize(CPreResNet20(in_channels, classes, norm, block, width), CPRERESNET_RULES)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> torch.nn.Conv2d:
    conv = torch.nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False
    )
    torch.nn.init.normal_(conv.weight, std=math.sqrt(2.0 / (kernel * kernel * out_channels)))
    return conv
