"""Ragged batches: random ones, what their rows hold, and each op as a loop over runs."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch import Tensor

Runs = list[tuple[int, int, int]]


def random_problems(seed: int, count: int, limit: int = 100) -> Iterator[Runs]:
    """Yield ``count`` lists of ``(rows, out_features, in_features)``, sorted largest first.

    Each has 1 to 16 runs, 1 to 300 rows and sizes from 1 to ``limit``; two thirds stay well below
    that, since what a problem costs grows faster than what it can show. Sizes repeat, and ones and
    full sizes come up often; in a third of the problems all sizes are multiples of 16. A seed
    always gives the same problems.
    """
    generator = random.Random(seed)
    for index in range(count):
        most = generator.choice([limit, -(-limit * 2 // 5), -(-limit // 8)])
        unit = 16 if index % 3 == 0 and most >= 16 else 1
        runs = generator.randint(1, 16)
        rows = _partition(generator, generator.randint(runs, generator.choice([20, 60, 300])), runs)
        out, in_ = (_sizes(generator, runs, most // unit * unit, unit) for _ in range(2))
        yield list(zip(rows, out, in_, strict=True))


def _partition(generator: random.Random, total: int, parts: int) -> list[int]:
    cuts = sorted(generator.sample(range(1, total), parts - 1))
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]


def _sizes(generator: random.Random, count: int, limit: int, unit: int) -> list[int]:
    pool = [generator.randint(1, limit // unit) * unit for _ in range(generator.randint(1, 8))]
    return sorted(generator.choices([*pool, unit, limit], k=count), reverse=True)


def largest(runs: Runs) -> tuple[int, int, int]:
    """Rows of the whole batch, and the first run's sizes."""
    return sum(rows for rows, _, _ in runs), runs[0][1], runs[0][2]


def spans(runs: Runs) -> Iterator[tuple[slice, int, int]]:
    """Which rows each run has, and its sizes."""
    begin = 0
    for rows, out_features, in_features in runs:
        yield slice(begin, begin + rows), out_features, in_features
        begin += rows


def fill_past(x: Tensor, runs: Runs, value: float, *, features: str) -> Tensor:
    """``x`` itself, filled past each row's size: ``features`` is ``"out"`` or ``"in"``."""
    for rows, out_features, in_features in spans(runs):
        x[rows, out_features if features == "out" else in_features :] = value
    return x


def ragged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Runs) -> Tensor:
    """``x @ weight.T + bias`` of each run's own block; zero past a row's output features."""
    n, m, _ = largest(runs)
    y = x.new_zeros(n, m)
    for rows, out, in_ in spans(runs):
        y[rows, :out] = x[rows, :in_].contiguous() @ weight[:out, :in_].contiguous().T
        if bias is not None:
            y[rows, :out] += bias[:out]
    return y


def ragged_dgrad(dy: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """``dy @ weight`` of each run's own block; zero past a row's input features."""
    n, _, k = largest(runs)
    dx = dy.new_zeros(n, k)
    for rows, out, in_ in spans(runs):
        dx[rows, :in_] = dy[rows, :out].contiguous() @ weight[:out, :in_].contiguous()
    return dx


def ragged_wgrad(dy: Tensor, x: Tensor, runs: Runs, start: Tensor) -> Tensor:
    """``start`` plus each run's ``dy.T @ x`` in its own block."""
    total = start.clone()
    for rows, out, in_ in spans(runs):
        total[:out, :in_] += dy[rows, :out].contiguous().T @ x[rows, :in_].contiguous()
    return total


def ragged_bias_grad(dy: Tensor, runs: Runs, start: Tensor) -> Tensor:
    """``start`` plus each run's ``dy.sum(0)`` in its own block."""
    total = start.clone()
    for rows, out, _ in spans(runs):
        total[:out] += dy[rows, :out].sum(0)
    return total
