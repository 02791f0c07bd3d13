"""A layer's active blocks as plain PyTorch takes them, worked out once for each size.

What a small layer costs is host time. So whatever does not change from step to step is found out
when a size is first met; a forward then only looks whether it still holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sorted_kernels.errors import GradientError
from sorted_kernels.ops import backend
from sorted_kernels.ops.checks import active_block, is_readable
from sorted_kernels.ops.gradient import IN_PLACE_TWICE, GradientSlot, in_place_allowed, slot_of

_functorch_is_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_autocast_is_active = torch._C._is_any_autocast_enabled


def lean_apply(node: type[Function]) -> Callable[..., Any]:
    """``node.apply`` for nodes on blocks, without what torch looks up at every call.

    Forward: functorch's wrappers, which :meth:`Blocks.current` has looked for. Backward: whether
    the node has a ``backward`` or a ``vjp``.
    """
    backward_node = getattr(node, "_backward_cls", None)
    if backward_node is not None:
        backward_node.apply = node.backward
    return super(Function, node).apply  # type: ignore[misc]


class Blocks:
    """The leading blocks of a layer's weight and bias, as views that autograd does not see.

    Attributes:
        sizes: (m, k), or (k,) of a norm, or (m, k, kernel height, kernel width).
        weight: ``weight[:m, :k]`` (the kernel's centre), or None as in the layer.
        bias: ``bias[:m]``, or None.
        train: Whether one of the parameters trains.
        weight_slot: Where the weight's gradient lands; None where it is frozen.
        bias_slot: The same of the bias.
        leaves: ``weight`` and ``bias`` for PyTorch's own autograd (:func:`leaf_of`).
    """

    __slots__ = (
        "sizes", "weight", "bias", "train", "weight_slot", "bias_slot", "leaves",
        "_generation", "_weight", "_bias", "_params", "_viewed",
    )  # fmt: skip
    weight: Any
    bias: Any

    def __init__(self, weight: Tensor | None, bias: Tensor | None, sizes: tuple[int, ...]) -> None:
        self.sizes, self._generation = sizes, backend.generation()
        self._weight, self._bias = weight, bias
        self.weight_slot, self.bias_slot = _slot(weight), _slot(bias)
        pairs = ((weight, self.weight_slot), (bias, self.bias_slot))
        self._params: list[tuple[Any, GradientSlot | None, int]] = [
            (param, slot, param.data_ptr()) for param, slot in pairs if param is not None
        ]
        self.train = self.weight_slot is not None or self.bias_slot is not None
        self.weight, self.bias = _block(weight, sizes), _block(bias, sizes[:1])
        self.leaves = leaf_of(self.weight, self.weight_slot), leaf_of(self.bias, self.bias_slot)
        self._viewed: dict[int, tuple[Tensor, int, Tensor]] = {}  # place -> buffer, address, view

    def views(self, buffers: tuple[Tensor | None, ...], size: int) -> list[Tensor | None]:
        """The first elements of a layer's buffers, which a training step reads and moves."""
        found: list[Tensor | None] = []
        for place, buffer in enumerate(buffers):
            if buffer is None or buffer.shape[0] == size:
                found.append(buffer)
                continue
            known = self._viewed.get(place)
            if known is None or known[0] is not buffer or known[1] != buffer.data_ptr():
                known = self._viewed[place] = buffer, buffer.data_ptr(), buffer[:size]
            found.append(known[2])
        return found

    def current(self, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether the blocks are those of these parameters, and plain PyTorch may run on them.

        The parameters still have their storage, train or not as before, and carry no hook.
        """
        if (
            weight is not self._weight
            or bias is not self._bias
            or self._generation != backend.generation()
            or _functorch_is_active()
            or _dispatch_modes()
            or _autocast_is_active()
        ):
            return False
        for param, slot, pointer in self._params:
            if param.data_ptr() != pointer or param.requires_grad is (slot is None):
                return False
            if slot is not None:
                hooks = param._post_accumulate_grad_hooks
                if param._backward_hooks or (hooks and len(hooks) > slot.hooked):
                    return False
        return True


def leaf_of(block: Any, slot: GradientSlot | None) -> Any:
    """A block as a leaf of PyTorch's autograd, whose gradient is moved on to where it lands.

    For operations of which PyTorch does forward and backward as well as we could. A node of ours
    would cost more than the interpreter's time: of what Python reads, nothing is in the caches
    after an activation of megabytes.

    Args:
        block: A block, or a copy of one, that autograd does not see; or None.
        slot: The parameter's; None: the block is returned as it is.
    """
    if block is None or slot is None:
        return block
    leaf, param = block.detach().requires_grad_(), slot.param()

    def land(leaf: Any, _alive: Tensor | None = param) -> None:
        gradient, leaf.grad = leaf.grad, None
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        slot.add(gradient)

    leaf.register_post_accumulate_grad_hook(land)
    return leaf


def _slot(param: Tensor | None) -> GradientSlot | None:
    return slot_of(param) if param is not None and param.requires_grad else None


def _block(param: Tensor | None, sizes: tuple[int, ...]) -> Tensor | None:
    return None if param is None else active_block(param.detach(), sizes)


class BlockCache(dict[tuple[int, ...], Blocks]):
    """The blocks of one layer by their sizes. A copied or pickled layer finds out its own."""

    def __deepcopy__(self, memo: object) -> BlockCache:
        return BlockCache()

    def __reduce__(self) -> tuple[type[BlockCache], tuple[()]]:
        return BlockCache, ()

    def find(
        self, op: str, weight: Tensor | None, bias: Tensor | None, sizes: tuple[int, ...]
    ) -> Blocks | None:
        """Blocks worked out anew; None where plain PyTorch cannot train on them as they are."""
        if _functorch_is_active() or _dispatch_modes():
            return None
        self.pop(sizes, None)
        if len(self) > 512:
            self.clear()
        params = [param for param in (weight, bias) if param is not None]
        if not all(_is_plain(op, param) for param in params):
            return None
        made = Blocks(weight, bias, sizes)
        if not made.current(weight, bias):
            return None
        self[sizes] = made
        return made


def _is_plain(op: str, param: Tensor) -> bool:
    """Whether a parameter is an ordinary one that PyTorch itself computes with."""
    return (
        type(param) is torch.nn.Parameter
        and is_readable(param)
        and backend.in_plain_torch(op, param)
        and (not param.requires_grad or in_place_allowed(slot_of(param), param))
    )
