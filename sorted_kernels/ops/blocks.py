"""A layer's active blocks as plain PyTorch takes them, worked out once for each size.

What a small layer costs is host time. So whatever does not change from step to step is found out
when a size is first met; a forward then only looks whether it still holds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.ops import backend
from sorted_kernels.ops.gradient import GradientSlot, in_place_allowed, slot_of

_functorch_is_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


class Blocks:
    """The leading blocks of a layer's weight and bias.

    Attributes:
        sizes: (m, k), or (k,) of a norm.
        weight: The block of the weight: a leaf of autograd's own graph, whose gradient the slot
            gets; or, where ``lean`` or frozen, a view that autograd does not see.
        bias: The same of the bias, or None.
        lean: The block is too large for autograd to give its gradient a tensor of its own.
        weight_slot: Where the weight's gradient lands; None where it is frozen.
        bias_slot: The same of the bias.
        autocast_device: Device type whose autocast concerns the blocks.
    """

    __slots__ = (
        "sizes", "weight", "bias", "lean", "weight_slot", "bias_slot", "autocast_device",
        "_generation", "_weight", "_bias", "_pointers", "_held",
    )  # fmt: skip

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None, sizes: tuple[int, ...], lean: bool
    ) -> None:
        self._generation = backend.generation()
        self._weight, self._bias, self.lean, self.sizes = weight, bias, lean, sizes
        self._pointers = (_pointer(weight), _pointer(bias))
        self._held: list[object] = []  # nothing else keeps a leaf's hook alive
        self.weight: Any
        self.weight_slot, self.weight = self._block(weight, sizes)
        self.bias_slot, self.bias = self._block(bias, sizes[:1])
        self.autocast_device = "cpu" if weight is None else weight.device.type

    def _block(
        self, param: Tensor | None, sizes: tuple[int, ...]
    ) -> tuple[GradientSlot | None, Tensor | None]:
        if param is None:
            return None, None
        slot = slot_of(param) if param.requires_grad else None
        if slot is not None and not self.lean:
            leaf = slot.leaf(param, *sizes)
            self._held.append(leaf)
            return slot, leaf.tensor
        block = param.detach()
        return slot, block[:, : sizes[1]][: sizes[0]] if len(sizes) > 1 else block[: sizes[0]]

    def current(self, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether the blocks are those of these parameters, and plain PyTorch may run on them."""
        return (
            weight is self._weight
            and bias is self._bias
            and self._generation == backend.generation()
            and not _functorch_is_active()
            and not _dispatch_modes()
            and (weight is None or _unchanged(weight, self.weight_slot, self._pointers[0]))
            and (bias is None or _unchanged(bias, self.bias_slot, self._pointers[1]))
            and not (self.lean and torch.is_autocast_enabled(self.autocast_device))
        )


def _unchanged(param: Tensor, slot: GradientSlot | None, pointer: int) -> bool:
    """Whether a parameter has its old storage, trains or not as before, and carries no hook."""
    if param.data_ptr() != pointer:
        return False
    if slot is None:
        return not param.requires_grad
    hooks = param._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    return (
        param.requires_grad
        and not param._backward_hooks
        and (not hooks or len(hooks) <= slot.hooked)
    )


def _pointer(param: Tensor | None) -> int:
    return 0 if param is None else param.data_ptr()


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
        large = math.prod(sizes) > backend.LEAF_ELEMENTS
        params = [param for param in (weight, bias) if param is not None]
        if (large and op != "linear") or not all(_is_plain(op, param) for param in params):
            return None
        lean = large and weight is not None and weight.requires_grad
        with torch.inference_mode(False):  # its views could never be trained through
            made = Blocks(weight, bias, sizes, lean)
        if not made.current(weight, bias):
            return None
        self[sizes] = made
        return made


def _is_plain(op: str, param: Tensor) -> bool:
    """Whether a parameter is an ordinary one that PyTorch itself computes with."""
    return (
        type(param) is torch.nn.Parameter
        and param.stride(-1) == 1
        and backend.in_plain_torch(op, param)
        and (not param.requires_grad or in_place_allowed(slot_of(param), param))
    )
