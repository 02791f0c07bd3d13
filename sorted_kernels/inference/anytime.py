"""Anytime inference: a better prediction after every exit, each block computed once.

The model's own forward runs once an exit. In each run the depth list hands out stand-ins: those of
blocks that have run replay what their block returned, only the new blocks compute; and the modules
before the blocks (embedding, stem) replay their outputs too. What remains an exit is its head,
which is the work that an exit is.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sorted_kernels.errors import DimensionError, OptionError
from sorted_kernels.nn import ModuleList, active, current, dimensions
from sorted_kernels.submodel import Submodel

_now = time.perf_counter  # tests put a clock of their own here


class AnytimeResult(NamedTuple):
    """A prediction of :func:`anytime`.

    Args:
        depth: Size of the depth dimension that gave it.
        output: What the model returned.
        elapsed_ms: Milliseconds since the generator was started. On a GPU its queue is waited for
            only where a deadline is given.
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

    Each output is exactly that of the model with its depth set to the exit, other dimensions as
    they were active at the call; each block is computed once. Between results the model is as it
    was, and it may be used or given up at any of them. The model runs in the mode it is in: call
    ``model.eval()`` first.

    Args:
        model: A model with one depth list, whose forward loops once over it.
        x: What the model takes.
        deadline_ms: Stop before an exit that would, judged by the last one, end after so many
            milliseconds. The first exit always comes.
        exits: Depths to give, rising; from 1 to the active depth otherwise.
        forward: Function of ``(model, x)`` that gives the output; ``model(x)`` otherwise.

    Raises:
        DimensionError: The model has no depth list, or several.
        OptionError: The deadline or the exits are out of range; or, while it runs, the model does
            not run each block exactly once or changes a hidden state in place.
    """
    blocks = _depth_list(model)
    axis = blocks.depth_axis
    base = current(model)
    depths = _check_exits(exits, base[axis.dimension], axis.full)
    if deadline_ms is not None and not deadline_ms >= 0:
        raise OptionError(f"deadline_ms is {deadline_ms!r}; allowed are numbers of at least 0")
    call = forward or (lambda model, x: model(x))
    submodels = [(depth, base.replace(**{axis.dimension: depth})) for depth in depths]
    return _exits(_Replay(model, blocks), lambda: call(model, x), submodels, deadline_ms)


def _exits(
    replay: _Replay,
    call: Callable[[], Any],
    submodels: list[tuple[int, Submodel]],
    deadline_ms: float | None,
) -> Iterator[AnytimeResult]:
    """Run exit after exit; nothing is left on the model while a result is out."""
    start = _now()
    done, step = 0, 0.0  # blocks so far, and seconds a block and its share of a head took last
    for depth, submodel in submodels:
        ahead = replay.count(submodel) - done
        expected = 1e3 * (_now() - start + ahead * step)
        if done and deadline_ms is not None and expected > deadline_ms:
            return
        with replay.ready(submodel, wait=deadline_ms is not None):
            output = call()
        end = _now()
        step = (end - replay.blocks_started) / ahead
        done += ahead
        yield AnytimeResult(depth, output, 1e3 * (end - start))
