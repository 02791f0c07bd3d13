"""Learning-rate schedules, stepped once an optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sorted_kernels.errors import OptionError


def _check(steps: int, warmup: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps is {steps!r}; allowed are integers of at least 1")
    if not isinstance(warmup, int) or not 0 <= warmup < steps:
        raise OptionError(f"warmup is {warmup!r}; allowed are integers from 0 to {steps - 1}")


def _progress(step: int, steps: int, warmup: int) -> float:
    """Position between the end of warm-up (0) and the last step (1); stays 1 after it."""
    return min((step - warmup) / (steps - warmup), 1.0)


def cosine(optimizer: Optimizer, steps: int, warmup: int = 0, final: float = 0.0) -> LambdaLR:
    """Linear warm-up, then half a cosine down to ``final`` times the learning rate.

    Args:
        optimizer: Its learning rates are the peaks.
        steps: Optimizer steps in all, warm-up included.
        warmup: Optimizer steps of warm-up; the first of them already has a learning rate above 0.
        final: Fraction of the peak that is left after ``steps``.

    Raises:
        OptionError: ``steps`` below 1, or ``warmup`` outside ``0..steps - 1``.
    """
    _check(steps, warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        wave = 0.5 * (1.0 + math.cos(math.pi * _progress(step, steps, warmup)))
        return final + (1.0 - final) * wave

    return LambdaLR(optimizer, factor)


def linear(optimizer: Optimizer, steps: int, warmup: int = 0, final: float = 0.0) -> LambdaLR:
    """Linear warm-up, then a straight line down to ``final`` times the learning rate.

    Args and errors are those of :func:`cosine`.
    """
    _check(steps, warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 1.0 - (1.0 - final) * _progress(step, steps, warmup)

    return LambdaLR(optimizer, factor)
