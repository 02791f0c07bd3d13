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
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sorted_kernels.errors import StrideError
from sorted_kernels.ops.checks import centre, channels_last, is_readable
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.staircase import Staircase

ANCHOR = torch.zeros((), requires_grad=True)
"""Makes autograd visit nodes whose parameters are detached because their gradients land in place.

A parameter that took part itself would have autograd's own accumulation run for it, with nothing
to add, which could not be told from a gradient that somebody else computed.
"""

_ANCHOR_NODE = ANCHOR.view_as(ANCHOR).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
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
        param: (M, K, ...) or (M,). The staircase covers trailing axes whole: where a convolution
            writes the centre of its kernel, the ring around it counts as covered, and is zero.
        matrix: Rows and columns of the matrix that the parameter's elements are taken for, one
            after the other, where its active part is no leading block of its own axes. Of three
            (K, M) projections that lie side by side in a (K, 3 M) parameter, the leading (k, m)
            blocks are the leading (3 k, m) block of the (3 K, M) matrix.
    """

    __slots__ = (
        "handle", "param", "matrix", "token", "buffer", "raw", "storage", "blocks", "version",
        "address", "staircase", "expected", "task", "hooked", "__weakref__",
    )  # fmt: skip

    def __init__(self, param: Tensor, matrix: tuple[int, int] | None = None) -> None:
        self.handle = next(_handles)
        # Stands for the gradient in compiled graphs: ops declare that they change it, so they are
        # neither dropped nor reordered, while the buffer can be attached lazily at run time.
        self.token = torch.zeros(1)
        self.buffer: Tensor | None = None
        self.raw: Tensor | None = None
        self.storage: torch.UntypedStorage | None = None
        self.blocks: dict[tuple[int, int], Tensor] = {}  # views of the buffer
        self.version = 0  # the buffer's version counter when it was last looked at
        self.address = 0  # and where its elements were
        self.matrix = matrix
        self.staircase = Staircase(*(matrix or _rows_and_columns(param)))
        self.expected: list[tuple[int, int]] = []
        self.task = -1  # the backward that the expected gradients belong to
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
        return None if param is None else slot_of(copy.deepcopy(param, memo), self.matrix)

    def __reduce__(self) -> tuple[object, ...]:
        param = self.param()
        return (type(None), ()) if param is None else (slot_of, (param, self.matrix))

    def fold(self, matrix: tuple[int, int]) -> None:
        """Take the parameter's elements for another matrix than before."""
        self.matrix, covered = matrix, bool(self.staircase)
        self.staircase = Staircase(*matrix)
        if covered:
            self.staircase.cover_all()
        if self.buffer is not None:
            self._adopt(self.buffer)

    def prefix(
        self, m: int, k: int = 1, taps: tuple[int, ...] | None = None
    ) -> tuple[Tensor, bool]:
        """The view ``grad[:m, :k]`` to write, recorded in the staircase.

        Args:
            m: Rows.
            k: Columns.
            taps: Sizes of the trailing axes, of which the centre is meant; all when not given.

        Returns:
            The view, and whether to add to it (True) or to overwrite it (False).
        """
        accumulate = self.record(m, k)
        view = self.block(m, k)
        if taps is None or view.shape[2:] == taps:
            return view, accumulate
        if not accumulate:  # what an earlier step left around the centre is covered, too
            view.zero_()
        return centre(view, taps), accumulate

    def add(self, gradient: Tensor) -> None:
        """Add a gradient of the prefix's shape (trailing axes: of their centre)."""
        shape = gradient.shape
        cols = shape[1] if len(shape) > 1 else 1
        view, accumulate = self.prefix(shape[0], cols, shape[2:] or None)
        if accumulate:
            view.add_(gradient)
        else:
            view.copy_(gradient)

    def block(self, m: int, k: int) -> Tensor:
        """The view ``buffer[:m, :k]`` for writing."""
        view = self.blocks.get((m, k))
        if view is None:
            raw = self.raw
            assert raw is not None
            if len(self.blocks) > 256:
                self.blocks.clear()
            view = self.blocks[m, k] = raw[:m] if raw.dim() == 1 else raw[:m, :k]
        return view

    def record(self, m: int, k: int) -> bool:
        """Attach the buffer and cover ``[:m, :k]``; whether its old contents count."""
        param = self.param()
        assert param is not None  # callers have looked
        grad, staircase = param.grad, self.staircase
        if grad is None:
            if self._reusable(param):
                for rows, cols in staircase.corners:
                    if rows > m or cols > k:
                        _clear_outside(self.raw, staircase, m, k)
                        break
            else:
                self._watch(param)
                self._adopt(_zeros_like(param))
            param.grad = self.buffer
            staircase.corners = [(m, k)]
            return False
        if grad is not self.buffer:  # somebody else's tensor: what it holds is unknown, so all
            if not is_readable(grad) or (self.matrix is not None and not grad.is_contiguous()):
                raise StrideError(
                    f"param.grad has strides {grad.stride()}; gradients are written in place, "
                    "which needs a unit inner stride (and packed ones to be contiguous)"
                )
            self._watch(param)
            self._adopt(grad)
            staircase.cover_all()
        elif grad._version != self.version or grad.data_ptr() != self.address:
            self._look_again(grad)
        accumulate = bool(staircase.corners)
        staircase.add(m, k)
        return accumulate

    def _reusable(self, param: Tensor) -> bool:
        """Whether the old buffer is ours alone: its contents known, and kept by nobody."""
        if self.buffer is None:
            return False
        assert self.storage is not None
        # The tensor itself may be kept, or an alias of it (``param.grad.detach()``). The storage
        # is used by the buffer, its alias, the object that names it, and the blocks.
        return (
            self.buffer._version == self.version
            and self.buffer.data_ptr() == self.address
            and self.buffer.dtype is param.dtype
            and self.buffer.device == param.device
            and (param.dim() < 4 or channels_last(self.buffer) is channels_last(param))
            and sys.getrefcount(self.buffer) <= 2
            and torch._C._storage_Use_Count(self.storage._cdata) <= 3 + len(self.blocks)
        )

    def _adopt(self, buffer: Tensor) -> None:
        """Take a tensor as the buffer.

        Writes go through an alias with a version counter of its own. So the buffer's counter moves
        only when somebody else writes, and views of the alias are not mistaken for users.
        """
        self.buffer, self.raw, self.storage = buffer, buffer.data, buffer.untyped_storage()
        if self.matrix is not None:
            self.raw = self.raw.view(self.matrix)
        self.blocks.clear()
        self.version, self.address = buffer._version, buffer.data_ptr()

    def _look_again(self, grad: Tensor) -> None:
        """Find out what the buffer holds after somebody else wrote into it."""
        self._adopt(grad)
        if self._any(self._uncovered()):
            self.staircase.cover_all()
        elif not self._any(self.block(end, k)[begin:] for begin, end, k in self.staircase.bands()):
            self.staircase.clear()

    def _uncovered(self) -> Iterator[Tensor]:
        raw, end = self.raw, 0
        assert raw is not None
        for begin, end, cols in self.staircase.bands():
            if raw.dim() > 1:
                yield raw[begin:end, cols:]
        yield raw[end:]

    @staticmethod
    def _any(views: Iterable[Tensor]) -> bool:
        return any(bool(view.any()) for view in views)

    def expect(self, m: int, k: int = 1) -> None:
        """Announce that autograd will add a dense gradient that is zero outside ``[:m, :k]``."""
        param = self.param()
        if param is None:
            return
        self._watch(param)
        task = torch._C._current_graph_task_id()
        if task != self.task:  # left by a backward that did not want this gradient
            self.expected.clear()
            self.task = task
            grad = param.grad
            if grad is not None and grad is self.buffer and grad._version != self.version:
                self._look_again(grad)
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
            self.staircase.clear()
        elif grad._version == self.version:
            return  # autograd had nothing to add: a compiled graph's backward ends this way
        self._adopt(grad)
        announced = bool(self.expected)  # here, or (double backward) where the graph was made
        self.staircase.update(self.expected)
        self.expected.clear()
        # Autograd has summed all uses of the parameter: another one than ours may be among them.
        if not announced or self._any(self._uncovered()):
            self.staircase.cover_all()

    def cleared(self) -> None:
        """Take note that the covered part of the gradient is being zeroed by somebody else."""
        self.staircase.clear()

    def zero(self) -> None:
        """Zero the gradient where the staircase is."""
        param = self.param()
        if param is None or param.grad is None:
            return
        if param.grad.requires_grad:  # made with create_graph=True
            param.grad.detach_()
        if param.grad is not self.buffer or param.grad._version != self.version:
            self._adopt(param.grad)
            self.staircase.cover_all()
        _clear_outside(self.raw, self.staircase, 0, 0)
        self.staircase.clear()


def _zeros_like(param: Tensor) -> Tensor:
    """Zeros in a parameter's memory format: optimizers walk through both alike."""
    kept = param.dim() == 4 and channels_last(param)
    form = torch.channels_last if kept else torch.contiguous_format
    return torch.zeros_like(param, memory_format=form)


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


def slot_of(param: Tensor, matrix: tuple[int, int] | None = None) -> GradientSlot:
    """The slot of a leaf parameter, made on first use; ``matrix`` as for :class:`GradientSlot`."""
    slot = _by_param.get(id(param))
    if slot is None:
        slot = _by_param[id(param)] = GradientSlot(param, matrix)
        _by_handle[slot.handle] = slot
    elif matrix is not None and slot.matrix != matrix:
        slot.fold(matrix)
    return slot


def folded(param: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of a parameter's shape as the matrix that its staircase is of, if it has one."""
    slot = _by_param.get(id(param))
    return tensor if slot is None or slot.matrix is None else tensor.view(slot.matrix)


def _rows_and_columns(param: Tensor) -> tuple[int, int]:
    """The two axes that a parameter's staircase has by itself."""
    return (param.shape[0] if param.dim() else 1), (param.shape[1] if param.dim() > 1 else 1)


def slot_if_any(param: Tensor) -> GradientSlot | None:
    """The slot of a parameter that a layer trains, or None."""
    return _by_param.get(id(param))


def lands(slot: GradientSlot | None) -> bool:
    """Whether the backward that is running wants a parameter's gradient.

    ``torch.autograd.grad(loss, x)`` does not, nor does a parameter that is gone.
    """
    if slot is None or slot.param() is None:
        return False
    return is_compiling() or parameters_wanted()


def parameters_wanted() -> bool:
    """Whether the (eager) backward that is running is for parameters too."""
    return torch._C._will_engine_execute_node(_ANCHOR_NODE)  # type: ignore


def in_place_allowed(slot: GradientSlot | None, param: Tensor) -> bool:
    """Whether gradients may bypass autograd's accumulation: a leaf that carries no user hook."""
    if slot is None:
        return False
    if is_compiling():  # hooks cannot be seen while a graph is traced
        return True
    if param._backward_hooks or torch._C._are_functorch_transforms_active():
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
    whole = Staircase(*(slot and slot.matrix or _rows_and_columns(param)))
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
    _by_handle[handle].add(gradient)


LIBRARY.impl("accumulate_prefix", _accumulate_prefix, "CompositeExplicitAutograd")


@torch.library.register_fake("sorted_kernels::accumulate_prefix", lib=LIBRARY)
def _(gradient: Tensor, token: Tensor, handle: int) -> None:
    return None
