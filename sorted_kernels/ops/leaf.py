"""Blocks of a parameter as leaves of autograd's own graph: the route of small layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sorted_kernels.errors import GradientError

if TYPE_CHECKING:
    from sorted_kernels.ops.gradient import GradientSlot

IN_PLACE_TWICE = (
    "double backward through gradients that land in place is not possible; give the layer "
    "grad_mode='dense', or call the functional op on the parameter"
)


def accumulation_node(leaf: Tensor) -> Any:
    """The node that accumulates a leaf's gradient; a leaf alone keeps it only weakly."""
    with torch.enable_grad():
        edge: Any = leaf.view_as(leaf).grad_fn
    return edge.next_functions[0][0]


class Leaf:
    """One block of a parameter that autograd sees as a leaf, whose gradient goes to the slot.

    A hook before the leaf's accumulation takes the gradient and passes nothing on: autograd would
    first clone it, since the gradient of a strided block comes out of a matrix product transposed.
    Gradients wait until the backward ends and are then delivered together, in one tight loop: a
    step has two a layer, and host time is what small layers cost.
    """

    __slots__ = ("tensor", "slot", "m", "k", "node")

    def __init__(self, slot: GradientSlot, param: Tensor, m: int, k: int) -> None:
        block = param.detach()
        self.tensor = (block[:m] if block.dim() == 1 else block[:m, :k]).requires_grad_()
        self.slot, self.m, self.k = slot, m, k
        self.node = accumulation_node(self.tensor)
        self.node.register_prehook(self.take)

    def take(self, gradients: tuple[Tensor | None]) -> tuple[None]:
        """Keep the block's gradient until the backward under way ends."""
        gradient = gradients[0]
        if gradient is not None:
            if gradient.requires_grad:
                raise GradientError(IN_PLACE_TWICE)
            task = torch._C._current_graph_task_id()
            waiting = _waiting.get(task)
            if waiting is None:
                waiting = _expect_deliveries(task)
            waiting.append((self, gradient))
        return _NOTHING


_NOTHING = (None,)
_waiting: dict[int, list[tuple[Leaf, Tensor]]] = {}  # gradients by the backward they are of


def _expect_deliveries(task: int) -> list[tuple[Leaf, Tensor]]:
    """Open a list for a backward, to be delivered at its end."""
    if len(_waiting) > 8:  # backwards inside backwards are few: the oldest ended with an error
        del _waiting[next(iter(_waiting))]
    _waiting[task] = []
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: _deliver(_waiting.pop(task, [])))
    return _waiting[task]


def _deliver(gradients: list[tuple[Leaf, Tensor]]) -> None:
    """Move the gradients of blocks into those of their parameters."""
    overwritten: tuple[list[Tensor], list[Tensor]] = ([], [])
    added: tuple[list[Tensor], list[Tensor]] = ([], [])
    for leaf, gradient in gradients:
        if leaf.slot.param() is not None:
            out, accumulate = leaf.slot.prefix(leaf.m, leaf.k)
            outs, values = added if accumulate else overwritten
            outs.append(out)
            values.append(gradient)
    with torch.no_grad():
        if overwritten[0]:
            torch._foreach_copy_(*overwritten)
        if added[0]:
            torch._foreach_add_(*added)
