"""MobileNetV2: sixteen inverted residual blocks of depthwise convolutions, any width and depth.

A width is a count out of ten, and its channels are those that ``transformers`` gives a
configuration whose ``depth_multiplier`` (of channels, in spite of its name) is so many tenths of
the model's: rounded its own way to multiples of ``depth_divisible_by``. So every width of a model
of whole depth is an ordinary, smaller checkpoint. The configuration has no number of blocks: a
sub-model of fewer is exported as a module, not as a checkpoint. After the last block that runs, the
shared ``conv_1x1`` reads as many leading input channels as that block has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sorted_kernels.models.architectures.registry import Rules, register_architecture
from sorted_kernels.nn.axis import AxisSpec, ElasticAxis

WIDTHS = 10
_CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
"""Of the stem and of each block at multiplier 1."""
_STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
_STEM, _OUTPUT = 32, 1280


def _divisible(config: Any, channels: int) -> int:
    """The multiple of ``depth_divisible_by`` that the model takes for so many channels."""
    step = config.depth_divisible_by
    near = max(config.min_depth, int(channels + step / 2) // step * step)
    return near + step if near < 0.9 * channels else near


def _sizes(config: Any, at: Callable[[float], int]) -> AxisSpec:
    """An axis that has, at each width, the channels that ``at`` gives for a multiplier."""
    return "width", tuple(at(_multiplier(config, width)) for width in range(1, WIDTHS + 1))


def _multiplier(config: Any, width: int) -> float:
    # Not multiplied and divided again where it is whole: rounding could change it.
    return config.depth_multiplier * (1 if width == WIDTHS else width / WIDTHS)


def _scaled(config: Any, channels: int) -> Callable[[float], int]:
    return lambda multiplier: _divisible(config, round(channels * multiplier))


def _expanded(config: Any, channels: int) -> Callable[[float], int]:
    scaled = _scaled(config, channels)
    return lambda multiplier: _divisible(config, round(scaled(multiplier) * config.expand_ratio))


def _output(config: Any) -> Callable[[float], int]:
    scaled = _scaled(config, _OUTPUT)
    return lambda multiplier: (
        _OUTPUT if config.finegrained_output and multiplier < 1.0 else scaled(multiplier)
    )


def _layer(path: str, kind: dict[str, AxisSpec]) -> dict[str, dict[str, AxisSpec]]:
    """Rules of a convolution and of the norm of its outputs."""
    return {
        f"{path}.convolution": kind,
        f"{path}.normalization": {"features": kind["out"]},
    }


def _rules(config: Any) -> Rules:
    stem = _sizes(config, _scaled(config, _STEM))
    channels = [_sizes(config, _scaled(config, count)) for count in _CHANNELS]
    rules: dict[str, Mapping[str, AxisSpec]] = {
        "layer": {"depth": "depth"},
        **_layer("conv_stem.first_conv", {"out": stem}),
        **_layer("conv_stem.expand_1x1", {"in": stem, "out": stem}),
        **_layer("conv_stem.conv_3x3", {"in": stem, "out": stem}),
        **_layer("conv_stem.reduce_1x1", {"in": stem, "out": channels[0]}),
        **_layer("conv_1x1", {"out": _sizes(config, _output(config))}),
    }
    for index, count in enumerate(_CHANNELS[:-1]):
        inside = _sizes(config, _expanded(config, count))
        block = f"layer.{index}"
        rules |= _layer(f"{block}.expand_1x1", {"in": channels[index], "out": inside})
        rules |= _layer(f"{block}.conv_3x3", {"in": inside, "out": inside})
        rules |= _layer(f"{block}.reduce_1x1", {"in": inside, "out": channels[index + 1]})
    return rules


def _heads(config: Any) -> Rules:
    return {"classifier": {"in": _sizes(config, _output(config))}}


class _LastBlockAxis(ElasticAxis):
    """As many channels as the last active block puts out, whichever it is.

    Args:
        blocks: The list of blocks.
        full: Channels of the deepest one.
    """

    __slots__ = ("_blocks",)

    def __init__(self, blocks: Any, full: int) -> None:
        self._blocks = blocks
        super().__init__(None, full)

    @property
    def active(self) -> int:  # type: ignore[override]
        """The active count."""
        return self._blocks.active_blocks()[-1].reduce_1x1.convolution.out_axis.active

    @active.setter
    def active(self, size: int) -> None:
        """Nothing: it follows the blocks."""

    @property
    def probe(self) -> torch.Tensor:  # type: ignore[override]
        """The empty tensor of that size."""
        return self.probe_of(self.active)

    @probe.setter
    def probe(self, probe: torch.Tensor) -> None:
        """Nothing."""


def _finish(model: torch.nn.Module) -> None:
    body: Any = getattr(model, "mobilenet_v2", model)
    head = body.conv_1x1.convolution
    axes = dict(head.axes)
    axes["in"] = _LastBlockAxis(body.layer, head.in_channels)
    head.make_elastic(head.grad_mode, **axes)


def _configuration(config: Any, sizes: dict[str, int]) -> dict[str, Any] | None:
    if sizes["depth"] != len(_STRIDES):
        return None
    multiplier = _multiplier(config, sizes["width"])
    if _residual_blocks(config, multiplier) != _residual_blocks(config, config.depth_multiplier):
        return None
    return {"depth_multiplier": multiplier}


def _residual_blocks(config: Any, multiplier: float) -> list[bool]:
    """Which blocks add their input: those whose shape stays, at that multiplier."""
    found, reached = [], 2
    for index, stride in enumerate(_STRIDES):
        taken = 1 if reached == config.output_stride else stride
        reached *= taken
        before, after = (
            _scaled(config, _CHANNELS[place])(multiplier) for place in (index, index + 1)
        )
        found.append(taken == 1 and before == after)
    return found


register_architecture(
    "MobileNetV2Model",
    "MobileNetV2ForImageClassification",
    rules=_rules,
    heads=_heads,
    dimensions=lambda config: {"width": WIDTHS},
    configuration=_configuration,
    finish=_finish,
)
