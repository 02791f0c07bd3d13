"""What is aimed at, a family at a time: the one list for cases, the terminal and the README."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LIMIT = "limit"


@dataclass(frozen=True)
class Goal:
    """``ours`` shall take at most ``at_most`` times what ``baseline`` takes.

    The baseline ``limit`` is the least time that the device's measured limits allow.
    """

    baseline: str
    at_most: float

    def __str__(self) -> str:
        if self.baseline == LIMIT:
            return f"at least {1 / self.at_most:.0%} of the limit"
        if self.at_most < 1:
            return f"at least {1 / self.at_most:.3g}x faster than {self.baseline}"
        return f"at most {self.at_most:.2f}x of {self.baseline}"

    def verdict(self, ratio: float) -> str:
        """``met``, or by how much a ratio of times misses the goal."""
        return "met" if ratio <= self.at_most else f"MISSED by {self.gap(ratio)}"

    def gap(self, ratio: float) -> str:
        """By how much a ratio of times is above what is allowed."""
        above = ratio / self.at_most - 1
        return f"{above:.0%}" if above >= 0.01 else "under 1%"


# Ideal speed-up of a step with AdamW over B0, M = K = 4096 in bfloat16, by rows and M / m: the
# traffic of naive slicing over that of the active block (a roofline, not a measurement).
ROOFLINE = {
    512: {8: 44.0, 4: 12.0, 2: 3.5},
    4096: {8: 15.0, 4: 4.5, 2: 1.8},
    16384: {8: 5.1, 4: 2.0, 2: 1.2},
}

EXPECTED = {
    False: {
        "linear_step": "training step of a linear layer",
        "model_step": "training step of a residual MLP",
        "conv_step": "training step of a convolution",
        "resnet_step": "training step of cPreResNet20",
        "transformer_step": "training step of a transformer block",
        "host": "host time of a call",
        "ragged": "ragged batches",
        "anytime": "every exit against the deepest alone",
        "linear_cross_entropy": "linear and cross-entropy in one, 8 exits",
        "memory": "peak memory of a step",
    },
    True: {
        "linear": "prefix GEMM, aligned and odd",
        "linear_step": "training step of a linear layer",
        "host": "host time of a call",
        "ragged": "ragged batches",
        "graph": "one graph for all sizes",
        "attention": "attention with heads a sample",
        "depthwise": "depthwise convolution",
        "layer_norm": "layer norm",
        "rms_norm": "RMS norm",
        "batch_norm": "batch norm",
        "linear_cross_entropy": "linear and cross-entropy in one, 8 exits",
        "lora": "LoRA",
        "adamw": "staircase AdamW",
    },
}
"""Families that have goals, on CPUs (False) and GPUs (True), by the start of their kernel's name;
those without a row are reported as not measured."""


def family_of(kernel: str, gpu: bool) -> str | None:
    """The key of :data:`EXPECTED` that a row's kernel belongs to."""
    fitting = [key for key in EXPECTED[gpu] if kernel == key or kernel.startswith(f"{key}_")]
    return max(fitting, key=len, default=None)


_CPU_GOALS = {
    ("host", "forward+backward"): (Goal("B0", 0.6),),
    # B1 is a loop over the sub-models, "full" all rows at full size.
    # B1 is chunked torch, an exit at a time; memory leaves the hidden states aside.
    ("linear_cross_entropy", "forward+backward"): (Goal("B1", 1.0),),
    ("linear_cross_entropy", "memory"): (Goal("one exit", 1.02), Goal("B0", 1 / 5)),
    ("ragged_linear", "forward+backward"): (Goal("B1", 1.15), Goal("full", 0.6)),
}


def goals_for(
    kernel: str, mode: str, sizes: Mapping[str, int], dtype: str, gpu: bool
) -> tuple[Goal, ...]:
    """The goals of one problem; none for a family that has none."""
    if kernel in ("linear_step", "model_step", "transformer_step", "conv_step", "resnet_step"):
        return _step_goals(kernel, sizes, dtype, gpu)
    if kernel == "anytime":  # B2 is the deepest sub-model alone
        return (Goal("B2", 1.1),)
    if not gpu:
        return _CPU_GOALS.get((kernel, mode), ())
    if kernel == "linear":
        return _linear_goals(sizes)
    if kernel == "host" and mode == "forward+backward":
        return (Goal("B0", 0.4),)
    if kernel in ("layer_norm", "rms_norm", "batch_norm"):
        return Goal("B2", 1 / 1.3), Goal(LIMIT, 1 / 0.9)
    if kernel == "depthwise":
        return Goal("B2", 1 / 1.3), Goal(LIMIT, 1 / 0.85)
    if (kernel, mode) == ("linear_cross_entropy", "forward+backward"):
        return (Goal("B1", 1 / 2.3),)
    if kernel == "adamw":
        return _adamw_goals(sizes)
    if kernel == "attention_each":  # "full" is PyTorch on all heads
        return (Goal("full", 1 / 1.5),)
    if kernel == "attention":
        return (Goal("B2", 1 / 0.95),)
    if kernel.startswith("ragged"):  # B1 is a loop of the library over the sub-models
        return Goal("B1", 1 / 1.3), Goal(LIMIT, 1 / 0.85)
    return ()


def _step_goals(kernel: str, sizes: Mapping[str, int], dtype: str, gpu: bool) -> tuple[Goal, ...]:
    goals = [Goal("B2", 1.10)]
    if kernel == "conv_step":
        goals.append(Goal("B0", 1.0))
    if kernel == "resnet_step" and sizes["width"] < sizes["WIDTH"]:
        goals.append(Goal("B0", 1 / 1.5 if 4 * sizes["width"] == sizes["WIDTH"] else 1.0))
    if kernel == "linear_step":
        part = sizes["M"] / sizes["m"]
        if sizes["N"] == 32 and part == 8:
            goals.append(Goal("B0", 1 / 8))
        ideal = ROOFLINE.get(sizes["N"], {}).get(round(part)) if part == round(part) else None
        square = sizes["M"] == sizes["K"] == 4096 and sizes["m"] == sizes["k"]
        if gpu and square and dtype == "bfloat16" and ideal:
            goals.append(Goal("B0", 1 / (0.9 * ideal)))
    return tuple(goals)


def _linear_goals(sizes: Mapping[str, int]) -> tuple[Goal, ...]:
    if any(sizes[name] % 8 for name in "MKmk"):
        return Goal("B1", 1 / 3), Goal("padded", 1 / 0.95)
    goals = [Goal("B1", 1.0)]
    if min(sizes[name] for name in "Nmk") >= 4096:
        goals.append(Goal(LIMIT, 1 / 0.95))
    return tuple(goals)


def _adamw_goals(sizes: Mapping[str, int]) -> tuple[Goal, ...]:
    whole, part = sizes["M"] * sizes["K"], sizes["m"] * sizes["k"]
    speedup = 1 / 1.05 if part == whole else 0.95 * whole / part
    return Goal("B0", 1 / speedup), Goal(LIMIT, 1 / 0.92)
