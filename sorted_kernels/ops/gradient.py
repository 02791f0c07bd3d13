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
import weakref

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sorted_kernels.errors import StrideError
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.staircase import Staircase

ANCHOR = torch.zeros((), requires_grad=True)
"""Makes autograd visit nodes whose parameters are detached because their gradients land in place.

A parameter that took part itself would have autograd's own accumulation run for it, with nothing
to add, which could not be told from a gradient that somebody else computed.
"""

_handles = itertools.count(1)
_by_param: dict[int, GradientSlot] = {}  # by id(param); an entry dies with its parameter
_by_handle: dict[int, GradientSlot] = {}


class GradientSlot:
    """The gradient buffer and staircase of one leaf parameter.

    Args:
        param: (M, K, ...) or (M,); trailing axes are always covered whole.
    """

    __slots__ = (
        "handle", "param", "token", "buffer", "staircase", "expected", "hooked", "__weakref__",
    )  # fmt: skip

    def __init__(self, param: Tensor) -> None:
        self.handle = next(_handles)
        # Stands for the gradient in compiled graphs: ops declare that they change it, so they are
        # neither dropped nor reordered, while the buffer can be attached lazily at run time.
        self.token = torch.zeros(1)
        self.buffer: Tensor | None = None
        self.staircase = Staircase(param.shape[0], param.shape[1] if param.dim() > 1 else 1)
        self.expected: list[tuple[int, int]] = []
        self.hooked = False
        key, handle = id(param), self.handle

        def forget(_: object) -> None:
            _by_param.pop(key, None)
            _by_handle.pop(handle, None)

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
        param = self.param()
        assert param is not None, "a gradient arrived for a parameter that is gone"
        grad = param.grad
        if grad is None or grad is not self.buffer:
            accumulate = self._attach(param, grad, m, k)
        else:
            accumulate = bool(self.staircase.corners)
        self.staircase.add(m, k)
        buffer = self.buffer
        assert buffer is not None
        return (buffer[:m] if buffer.dim() == 1 else buffer[:m, :k]), accumulate

    def _attach(self, param: Tensor, grad: Tensor | None, m: int, k: int) -> bool:
        """Make ``param.grad`` the buffer; the return value is :meth:`prefix`'s ``accumulate``."""
        self._watch(param)
        if grad is not None:  # somebody else's tensor: what it holds is unknown, so all of it
            if grad.stride(-1) != 1:
                raise StrideError(
                    f"param.grad has strides {grad.stride()}; gradients are written in place, "
                    "which needs a unit inner stride"
                )
            self.buffer = grad
            self.staircase.cover_all()
            return True
        buffer = self.buffer
        if buffer is None or buffer.dtype != param.dtype or buffer.device != param.device:
            self.buffer = buffer = torch.zeros_like(param, memory_format=torch.contiguous_format)
        else:
            _clear_outside(buffer, self.staircase, m, k)
        self.staircase.clear()
        param.grad = buffer
        return False

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
        if param.grad is None:
            return
        if param.grad is not self.buffer:
            self.buffer = param.grad
            self.staircase.clear()
        if self.expected:
            self.staircase.update(self.expected)
            self.expected.clear()
        else:
            self.staircase.cover_all()

    def zero(self, set_to_none: bool) -> None:
        """Clear the gradient: at once where the staircase is, or lazily by detaching it."""
        param = self.param()
        if param is None or param.grad is None:
            return
        if param.grad is not self.buffer:
            self.buffer = param.grad
            self.staircase.cover_all()
        if set_to_none:
            param.grad = None
        else:
            _clear_outside(param.grad, self.staircase, 0, 0)
            self.staircase.clear()


def _clear_outside(buffer: Tensor, staircase: Staircase, m: int, k: int) -> None:
    """Zero what the staircase covers outside ``[:m, :k]``."""
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


def zero_gradient(param: Tensor, set_to_none: bool = True) -> None:
    """Clear one parameter's gradient at the cost of its staircase (or none: ``set_to_none``)."""
    slot = _by_param.get(id(param))
    if slot is not None:
        slot.zero(set_to_none)
    elif param.grad is not None:
        if set_to_none:
            param.grad = None
        else:
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
