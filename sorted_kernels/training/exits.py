"""Sub-models that differ in depth alone share one forward: each is an exit of it.

As in Sorted Fine-Tuning (exits after chosen layers under one norm and one head) and in the
stochastic summation of SortedNet, whose chains along the depth cost little more than their deepest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sorted_kernels.errors import OptionError
from sorted_kernels.models.replay import Replay
from sorted_kernels.nn import depth_lists, dimensions
from sorted_kernels.submodel import Submodel


def chains(model: nn.Module, submodels: Sequence[Submodel]) -> list[list[Submodel]]:
    """Sub-models grouped by what they share beside the depth, each group shallow to deep.

    Args:
        model: An elastic model; with several depth lists, or none, each sub-model stays alone.
        submodels: In any order; of equal ones each counts.
    """
    lists = list(depth_lists(model).values())
    depth = str(lists[0].axes["depth"].dimension) if len(lists) == 1 else ""
    if not all(depth in submodel for submodel in submodels):
        return [[submodel] for submodel in submodels]
    groups: dict[Submodel, list[Submodel]] = {}
    for submodel in submodels:
        groups.setdefault(submodel.replace(**{depth: 1}), []).append(submodel)
    return [sorted(group, key=lambda submodel: submodel[depth]) for group in groups.values()]


def forward_exits(
    model: nn.Module, chain: Sequence[Submodel], forward: Callable[[], Any]
) -> list[Any]:
    """What a model gives at several depths, each block computed once, ready for one backward.

    The model's forward runs once an exit; blocks, and modules before them, that ran at a smaller
    depth give what they gave then. So what a layer draws (dropout) is drawn once for all exits.

    Args:
        model: A model with one depth list, whose forward loops once over it, first block first.
        chain: Sub-models that differ in depth alone, shallow to deep.
        forward: Runs the model.

    Returns:
        What ``forward`` gave, in the chain's order.

    Raises:
        OptionError: The model does not run each block once, or changes a hidden state in place.
        DimensionError: A sub-model does not fit the model.
    """
    ((name, blocks),) = depth_lists(model).items()
    axis = blocks.axes["depth"]
    depth = str(axis.dimension)
    full = dimensions(model)[depth]
    replay = Replay(model, name, blocks, grad=True)
    try:
        return [
            replay.run(forward, submodel, axis.scaled(submodel[depth], full)) for submodel in chain
        ]
    except OptionError as error:
        remedy = "share_depths=False gives each depth a forward of its own"
        raise OptionError(f"{error} (with objectives, {remedy})") from error
