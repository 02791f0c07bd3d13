"""Where gradients land: a leaf parameter's ``.grad``, written in place and only in the prefix.

Every parameter that an ``sk.nn`` layer trains has one :class:`GradientSlot`. It owns the gradient
buffer (allocated once) and the staircase: which part of the buffer is not zero. ``param.grad`` is
that buffer, an ordinary dense tensor, so any torch optimizer can use it. Setting ``param.grad`` to
None (torch's usual ``zero_grad``) costs nothing: the buffer waits with its old contents, and the
next write overwrites the prefix and clears only what the old staircase has outside it.
"""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError, StrideError
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.staircase import Staircase

ANCHOR = torch.zeros((), requires_grad=True)
"""Makes autograd visit nodes whose parameters are detached because their gradients land in place.

A parameter that took part itself would have autograd's own accumulation run for it, with nothing
to add, which could not be told from a gradient that somebody else computed.
"""

IN_PLACE_TWICE = (
    "double backward through gradients that land in place is not possible; give the layer "
    "grad_mode='dense', or call the functional op on the parameter"
)
_handles = itertools.count(1)
_by_param: dict[int, GradientSlot] = {}  # by id(param); an entry dies with its parameter
_by_handle: dict[int, GradientSlot] = {}


class GradientSlot:
    """The gradient buffer and staircase of one leaf parameter.

    Args:
        param: (M, K, ...) or (M,); trailing axes are always covered whole.
    """

    __slots__ = (
        "handle", "param", "token", "buffer", "raw", "version", "generation", "staircase",
        "expected", "hooked", "leaves", "pointer", "__weakref__",
    )  # fmt: skip

    def __init__(self, param: Tensor) -> None:
        self.handle = next(_handles)
        # Stands for the gradient in compiled graphs: ops declare that they change it, so they are
        # neither dropped nor reordered, while the buffer can be attached lazily at run time.
        self.token = torch.zeros(1)
        self.buffer: Tensor | None = None
        self.raw: Tensor | None = None
        self.version = 0  # the buffer's version counter when it was last looked at
        self.generation = 0  # goes up when another tensor becomes the buffer
        self.leaves: dict[tuple[int, int], Leaf] = {}
        self.pointer = 0
        self.staircase = Staircase(param.shape[0], param.shape[1] if param.dim() > 1 else 1)
        self.expected: list[tuple[int, int]] = []
        self.hooked = False
        key, handle, leaves = id(param), self.handle, self.leaves

        def forget(_: object) -> None:
            _by_param.pop(key, None)
            _by_handle.pop(handle, None)
            leaves.clear()  # they are views of the parameter's storage

        self.param = weakref.ref(param, forget)

    @staticmethod
    def by_handle(handle: int) -> GradientSlot:
        """The slot that a compiled graph names by number."""
        return _by_handle[handle]

    def __deepcopy__(self, memo: dict[int, object]) -> GradientSlot | None:
        """A copied module's slot is that of its own, copied parameter."""
        param = self.param()
        return None if param is None else slot_of(copy.deepcopy(param, memo))

    def __reduce__(self) -> tuple[object, ...]:
        param = self.param()
        return (type(None), ()) if param is None else (slot_of, (param,))

    def prefix(self, m: int, k: int = 1) -> tuple[Tensor, bool]:
        """The view ``grad[:m, :k]`` to write, recorded in the staircase.

        Returns:
            The view, and whether to add to it (True) or to overwrite it (False).
        """
        accumulate = self.record(m, k)
        return self.block(m, k), accumulate

    def block(self, m: int, k: int) -> Tensor:
        """The view ``buffer[:m, :k]`` for writing."""
        raw = self.raw
        assert raw is not None
        return raw[:m] if raw.dim() == 1 else raw[:m, :k]

    def record(self, m: int, k: int) -> bool:
        """Attach the buffer and cover ``[:m, :k]``; whether its old contents count."""
        param = self.param()
        assert param is not None, "a gradient arrived for a parameter that is gone"
        grad = param.grad
        if grad is None:
            self._attach(param, m, k)
            self.staircase.corners = [(m, k)]
            return False
        if grad is not self.buffer:  # somebody else's tensor: what it holds is unknown, so all
            if grad.stride(-1) != 1:
                raise StrideError(
                    f"param.grad has strides {grad.stride()}; gradients are written in place, "
                    "which needs a unit inner stride"
                )
            self._watch(param)
            self._adopt(grad)
            self.staircase.cover_all()
        self.version = grad._version
        accumulate = bool(self.staircase.corners)
        self.staircase.add(m, k)
        return accumulate

    def _attach(self, param: Tensor, m: int, k: int) -> None:
        """Make the buffer ``param.grad``, zero outside ``[:m, :k]``."""
        buffer = self.buffer
        if (
            buffer is not None
            and sys.getrefcount(buffer) <= 3  # nobody kept it from an earlier step
            and buffer.dtype is param.dtype
            and buffer.device == param.device
        ):
            for rows, cols in self.staircase.corners:
                if rows > m or cols > k:
                    _clear_outside(self.raw, self.staircase, m, k)
                    break
        else:
            self._watch(param)
            buffer = torch.zeros_like(param, memory_format=torch.contiguous_format)
            self._adopt(buffer)
        param.grad = buffer
        self.version = buffer._version

    def _adopt(self, buffer: Tensor) -> None:
        """Take a tensor as the buffer.

        Writes go through an alias with a version counter of its own. So the buffer's counter moves
        only when somebody else writes, and views of the alias are not mistaken for users.
        """
        self.buffer, self.raw = buffer, buffer.data
        self.generation += 1

    def leaf(self, param: Tensor, m: int, k: int = 1) -> Tensor:
        """The block ``param[:m, :k]`` as a leaf of autograd's own graph.

        Autograd differentiates it in C++ and hands its gradient to the slot, which copies it into
        the prefix: less host time than a Python node, one more pass over the block.
        """
        pointer = param.data_ptr()
        if pointer != self.pointer or len(self.leaves) > 256:  # the storage was swapped
            self.leaves.clear()
            self.pointer = pointer
        found = self.leaves.get((m, k))
        if found is None:
            found = self.leaves[m, k] = Leaf(self, param, m, k)
        return found.tensor

    def expect(self, m: int, k: int = 1) -> None:
        """Announce that autograd will add a dense gradient that is zero outside ``[:m, :k]``."""
        param = self.param()
        if param is not None:
            self._watch(param)
            self.expected.append((m, k))

    def _watch(self, param: Tensor) -> None:
        """Notice gradients that autograd accumulates by itself, whose support is not recorded."""
        if not self.hooked:
            self.hooked = True
            param.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, param: Tensor) -> None:
        grad = param.grad
        if grad is None:
            return
        if grad is not self.buffer:
            self._adopt(grad)
            self.staircase.clear()
        elif grad._version == self.version:
            return  # autograd had nothing to add: a compiled graph's backward ends this way
        self.version = grad._version
        if self.expected:
            self.staircase.update(self.expected)
            self.expected.clear()
        else:
            self.staircase.cover_all()

    def cleared(self) -> None:
        """Take note that the covered part of the gradient is being zeroed by somebody else."""
        self.staircase.clear()

    def zero(self) -> None:
        """Zero the gradient where the staircase is."""
        param = self.param()
        if param is None or param.grad is None:
            return
        if param.grad is not self.buffer:
            self._adopt(param.grad)
            self.staircase.cover_all()
        _clear_outside(self.raw, self.staircase, 0, 0)
        self.staircase.clear()


class Leaf:
    """One block of a parameter that autograd sees as a leaf, whose gradient goes to the slot.

    A hook before the leaf's accumulation takes the gradient and passes nothing on: autograd would
    first clone it, since the gradient of a strided block comes out of a matrix product transposed.
    """

    __slots__ = ("tensor", "slot", "m", "k", "node", "out", "generation")

    def __init__(self, slot: GradientSlot, param: Tensor, m: int, k: int) -> None:
        block = param.detach()
        self.tensor = (block[:m] if block.dim() == 1 else block[:m, :k]).requires_grad_()
        self.slot, self.m, self.k = slot, m, k
        self.generation = -1
        with torch.enable_grad():
            # Held, because a leaf keeps its accumulation node, and so the hook, only weakly.
            edge: Any = self.tensor.view_as(self.tensor).grad_fn
            self.node = edge.next_functions[0][0]
        self.node.register_prehook(self.deliver)

    def deliver(self, gradients: tuple[Tensor | None]) -> tuple[None]:
        """Move the block's gradient into the parameter's."""
        gradient = gradients[0]
        if gradient is None:
            return (None,)
        if gradient.requires_grad:
            raise GradientError(IN_PLACE_TWICE)
        slot = self.slot
        accumulate = slot.record(self.m, self.k)
        if self.generation != slot.generation:
            self.out = slot.block(self.m, self.k)
            self.generation = slot.generation
        if accumulate:
            self.out.add_(gradient)
        else:
            self.out.copy_(gradient)
        return (None,)


def _clear_outside(buffer: Tensor | None, staircase: Staircase, m: int, k: int) -> None:
    """Zero what the staircase covers outside ``[:m, :k]``."""
    assert buffer is not None
    with torch.no_grad():
        for begin, end, cols in staircase.bands():
            if buffer.dim() == 1:
                buffer[max(begin, m) : end].zero_()
                continue
            if end > m:
                buffer[max(begin, m) : end, :cols].zero_()
            if begin < m and cols > k:
                buffer[begin : min(end, m), k:cols].zero_()


def slot_of(param: Tensor) -> GradientSlot:
    """The slot of a leaf parameter, made on first use."""
    slot = _by_param.get(id(param))
    if slot is None:
        slot = _by_param[id(param)] = GradientSlot(param)
        _by_handle[slot.handle] = slot
    return slot


def slot_if_any(param: Tensor) -> GradientSlot | None:
    """The slot of a parameter that a layer trains, or None."""
    return _by_param.get(id(param))


def in_place_allowed(slot: GradientSlot, param: Tensor) -> bool:
    """Whether gradients may bypass autograd's accumulation: a leaf that carries no user hook."""
    if not param.is_leaf:
        return False
    if is_compiling():  # hooks cannot be seen while a graph is traced
        return True
    if param._backward_hooks:
        return False
    hooks = param._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    return not hooks or len(hooks) <= slot.hooked


def prefix_leaf(slot: GradientSlot | None, param: Tensor, m: int, k: int = 1) -> Tensor:
    """The block ``param[:m, :k]`` for autograd's own nodes; a plain view where nothing trains."""
    if slot is not None:
        return slot.leaf(param, m, k)
    return param[:m] if param.dim() == 1 else param[:m, :k]


def detached(param: Tensor | None) -> Tensor | None:
    """A parameter without its place in the graph; shares storage and version counter."""
    return None if param is None else param.detach()


def staircase_of(param: Tensor) -> Staircase:
    """Which part of ``param.grad`` may differ from zero.

    Returns:
        An empty staircase where there is no gradient, the whole matrix where the gradient did not
        come from this library's in-place path. Do not change it.
    """
    slot = _by_param.get(id(param))
    if slot is not None and param.grad is not None and param.grad is slot.buffer:
        return slot.staircase
    whole = Staircase(
        param.shape[0] if param.dim() else 1, param.shape[1] if param.dim() > 1 else 1
    )
    if param.grad is not None:
        whole.cover_all()
    return whole


def zero_gradient(param: Tensor) -> None:
    """Zero one parameter's gradient, at the cost of its staircase."""
    slot = _by_param.get(id(param))
    if slot is not None:
        slot.zero()
    elif param.grad is not None:
        param.grad.zero_()


LIBRARY.define("accumulate_prefix(Tensor gradient, Tensor(a!) token, SymInt handle) -> ()")


def _accumulate_prefix(gradient: Tensor, token: Tensor, handle: int) -> None:
    view, accumulate = _by_handle[handle].prefix(*gradient.shape)
    if accumulate:
        view.add_(gradient)
    else:
        view.copy_(gradient)


LIBRARY.impl("accumulate_prefix", _accumulate_prefix, "CompositeExplicitAutograd")


@torch.library.register_fake("sorted_kernels::accumulate_prefix", lib=LIBRARY)
def _(gradient: Tensor, token: Tensor, handle: int) -> None:
    return None
