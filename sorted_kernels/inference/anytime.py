"""Anytime inference: a better prediction after every exit, each block computed once.

The model's own forward runs once an exit. In each run the depth list hands out stand-ins: those of
blocks that have run replay what their block returned, only the new blocks compute; and the modules
before the blocks (embedding, stem) replay their outputs too. What remains an exit is its head,
which is the work that an exit is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from sorted_kernels.errors import DimensionError, OptionError
from sorted_kernels.models import replay as replaying
from sorted_kernels.models.replay import Replay
from sorted_kernels.nn import ElasticAxis, current, depth_lists, dimensions
from sorted_kernels.nn.module_list import DepthContainer
from sorted_kernels.submodel import Submodel


class AnytimeResult(NamedTuple):
    """A prediction of :func:`anytime`.

    Args:
        depth: Size of the depth dimension that gave it.
        output: What the model returned.
        elapsed_ms: Milliseconds since the first result was asked for. Without a deadline a GPU is
            not waited for, and may still be computing the output.
    """

    depth: int
    output: Any
    elapsed_ms: float


def anytime(
    model: torch.nn.Module,
    x: Any,
    deadline_ms: float | None = None,
    *,
    exits: Sequence[int] | None = None,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
) -> Iterator[AnytimeResult]:
    """Give the prediction of every exit of the depth dimension, shallow to deep.

    Each output is exactly that of the model with its depth set to the exit and other dimensions as
    they were at the call; each block is computed once. While a result is out the model is as it
    was: it may be used, switched, or the rest of the exits given up. The model runs without
    gradients, in the mode it is in: call ``model.eval()`` first.

    Args:
        model: A model with one depth list, whose forward loops once over it, first block first.
        x: What the model takes.
        deadline_ms: Stop before an exit that would, judged by the last one, end later than this.
            The first exit always comes.
        exits: Depths to give, rising; otherwise from 1 to the active depth.
        forward: Function of ``(model, x)`` that gives the output; ``model(x)`` otherwise.

    Yields:
        One result an exit.

    Raises:
        DimensionError: The model has no depth list, or several.
        OptionError: The deadline or the exits are out of range; or, when it runs, the model does
            not run each block once, or changes a hidden state in place.
    """
    name, blocks, axis = _depth_list(model)
    dimension, base = str(axis.dimension), current(model)
    full = dimensions(model)[dimension]
    if deadline_ms is not None and not deadline_ms >= 0:
        raise OptionError(f"deadline_ms={deadline_ms!r}; allowed are numbers of at least 0")
    depths = _default_exits(axis, base[dimension], full) if exits is None else list(exits)
    _check_exits(depths, dimension, full)
    plan = [(axis.scaled(depth, full), base.replace(**{dimension: depth})) for depth in depths]

    def run() -> Any:
        return model(x) if forward is None else forward(model, x)

    return _exits(Replay(model, name, blocks), run, dimension, plan, deadline_ms)


def _exits(
    replay: Replay,
    run: Callable[[], Any],
    dimension: str,
    plan: list[tuple[int, Submodel]],
    deadline_ms: float | None,
) -> Iterator[AnytimeResult]:
    """Run exit after exit; nothing of it is on the model while a result is out."""
    start = replaying.now()
    done, seconds_a_block = 0, 0.0
    for count, submodel in plan:
        expected = replaying.now() - start + (count - done) * seconds_a_block
        if done and deadline_ms is not None and 1e3 * expected > deadline_ms:
            return
        output = replay.run(run, submodel, count, wait=deadline_ms is not None)
        end = replaying.now()
        if replay.progress.blocks_started is not None:  # an exit's head counts with its blocks
            seconds_a_block = (end - replay.progress.blocks_started) / (count - done)
        done = count
        yield AnytimeResult(submodel[dimension], output, 1e3 * (end - start))


def _depth_list(model: torch.nn.Module) -> tuple[str, DepthContainer, ElasticAxis]:
    """The model's only list with an elastic depth: its path, itself, its axis."""
    found = depth_lists(model)
    if len(found) == 1:
        ((name, blocks),) = found.items()
        return name, blocks, blocks.axes["depth"]
    there = list(dimensions(model)) or "none"
    if not found:
        raise DimensionError(
            f"{type(model).__name__} has no module list with an elastic depth to exit from; its "
            f"dimensions are {there}"
        )
    listed = ", ".join(
        f"{name} ({blocks.axes['depth'].dimension})" for name, blocks in found.items()
    )
    raise DimensionError(
        f"{type(model).__name__} has {len(found)} lists with an elastic depth: {listed}; anytime "
        f"exits from exactly one (its dimensions are {there})"
    )


def _default_exits(axis: ElasticAxis, active: int, full: int) -> list[int]:
    """Every depth to the active one that has a block more than the depth before it."""
    counts = [0, *(axis.scaled(depth, full) for depth in range(1, active + 1))]
    return [depth for depth in range(1, active + 1) if counts[depth] > counts[depth - 1]]


def _check_exits(depths: list[int], dimension: str, full: int) -> None:
    whole = all(isinstance(d, int) and not isinstance(d, bool) and 1 <= d <= full for d in depths)
    if not depths or not whole or sorted(set(depths)) != depths:
        raise OptionError(
            f"exits={depths!r}; allowed are rising sizes of dimension {dimension!r} in 1..{full}"
        )
