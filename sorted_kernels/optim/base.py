"""What the staircase optimizers share: which part of each parameter a step moves."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import optimizer as torch_optimizer

from sorted_kernels.errors import DTypeError, OptionError, StrideError
from sorted_kernels.ops.checks import channels_last
from sorted_kernels.ops.gradient import folded, slot_if_any, staircase_of, zero_gradient
from sorted_kernels.staircase import Staircase

UPDATES = ("active", "whole")
_HALF = (torch.bfloat16, torch.float16)
_WIDE = (torch.float32, torch.float64)


class Record:
    """What the optimizer keeps at hand of one parameter: its slot, and its tensors as a matrix."""

    __slots__ = (
        "param", "matrix", "pointer", "kind", "reshaped", "whole", "inner", "taps", "state",
        "states", "master", "slot",
    )  # fmt: skip

    def __init__(self, param: Tensor, state: dict[str, Any], names: tuple[str, ...]) -> None:
        self.param, self.state, self.slot = param, state, slot_if_any(param)
        self.pointer = param.data_ptr()
        self.kind = sys.intern(f"{param.device} {param.dtype}")
        self.taps = _taps_as_rows(param)
        self.matrix = as_matrix(param, param.detach(), self.taps > 1)
        self.reshaped = self.matrix.shape != param.shape
        folds = self.slot is not None and self.slot.matrix is not None
        cols = self.matrix.shape[1] if folds else param.shape[1] if param.dim() > 1 else 1
        self.whole = [(self.matrix.shape[0] // self.taps, cols)]
        self.inner = 1 if folds else math.prod(param.shape[2:]) // self.taps
        self.states = [as_matrix(param, state[name], self.taps > 1) for name in names]
        master = state.get("master")
        self.master = None if master is None else as_matrix(param, master, self.taps > 1)


def _taps_as_rows(param: Tensor) -> int:
    """Rows of the matrix to one of the parameter: a kernel's taps in channels-last memory."""
    return math.prod(param.shape[2:]) if param.dim() == 4 and channels_last(param) else 1


def as_matrix(param: Tensor, tensor: Tensor, taps_as_rows: bool = False) -> Tensor:
    """A tensor of a parameter's shape as the matrix that its staircase is of, as a view.

    Axes beyond the second are joined to the columns; a scalar is a row of one. In channels-last
    memory they are joined to the rows, or columns would not be a prefix.
    """
    if taps_as_rows:
        return tensor.permute(0, 2, 3, 1).flatten(0, 2)
    tensor = folded(param, tensor)
    if tensor.dim() > 2:
        return tensor.flatten(1)
    return tensor if tensor.dim() else tensor.view(1)


class Bucket:
    """Parameters of one group that share device and dtypes, as the ops take them."""

    __slots__ = ("records", "grads", "bands")

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.grads: list[Tensor] = []
        self.bands: list[int] = []

    @property
    def params(self) -> list[Tensor]:
        """The parameters as matrices."""
        return [record.matrix for record in self.records]

    @property
    def states(self) -> list[list[Tensor]]:
        """One list a state."""
        return [list(states) for states in zip(*[r.states for r in self.records], strict=True)]

    @property
    def masters(self) -> list[Tensor]:
        """The float32 masters of half-precision parameters; empty for others."""
        return [record.master for record in self.records if record.master is not None]

    @property
    def steps(self) -> list[int]:
        """How often each parameter has moved, this step included."""
        return [record.state["step"] for record in self.records]


class StaircaseOptimizer(torch.optim.Optimizer):
    """Base of :class:`AdamW` and :class:`SGD`: moves the staircase of each gradient, or all of it.

    bfloat16 and float16 parameters get a float32 master copy and float32 states.
    """

    STATES: tuple[str, ...] = ()

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        update: str,
        clear_grads: bool,
    ) -> None:
        if update not in UPDATES:
            raise OptionError(f"update={update!r}; allowed are {', '.join(UPDATES)}")
        for name in ("lr", "weight_decay"):
            if not defaults[name] >= 0:
                raise OptionError(f"{name}={defaults[name]!r} must be at least 0")
        self.update, self.clear_grads = update, clear_grads
        self._records: dict[int, Record] = {}  # by id(param)
        super().__init__(params, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: Computes the loss again and returns it, as in torch.

        Raises:
            DTypeError: A sparse gradient, or a parameter that is not floating.
            StrideError: A parameter whose rows are not contiguous.
        """
        if _watched(self):
            return _step_with_hooks(self, closure)
        return self._step(closure)

    # Torch wraps every optimizer's step for its hooks and its profiler, at the cost of a small
    # step of ours; that wrapper is called above where somebody listens.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for bucket in self._collect(group):
                params = bucket.params
                self._apply(group, bucket, params)
                increment_version(params)
        return loss

    def _apply(self, group: dict[str, Any], bucket: Bucket, params: list[Tensor]) -> None:
        raise NotImplementedError

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.STATES

    def _collect(self, group: dict[str, Any]) -> Iterable[Bucket]:
        """Gather gradients, states and bands: the host time of a step."""
        names = self._state_names(group)
        buckets: dict[Any, Bucket] = {}
        bucket, kind, grad_dtype = Bucket(), None, None
        whole = self.update == "whole"
        params = group["params"]
        for param, record in zip(params, map(self._records.get, map(id, params)), strict=True):
            grad = param.grad
            if grad is None:
                continue
            if (
                record is None
                or record.pointer != param.data_ptr()
                or len(record.states) != len(names)  # momentum was turned on or off
                or (record.slot is None and slot_if_any(param) is not None)  # now elastic
            ):
                record = self._make_record(param, grad, names)
            slot = record.slot
            if slot is not None and grad is not slot.buffer:
                slot = None  # this gradient came another way
            if whole:
                corners = record.whole
            else:
                corners = (slot.staircase if slot is not None else staircase_of(param)).corners
                if not corners:
                    continue
            if record.kind is not kind or grad.dtype is not grad_dtype:
                kind, grad_dtype = record.kind, grad.dtype
                bucket = buckets.setdefault((kind, grad_dtype), Bucket())
            index, begin, inner, taps = len(bucket.records), 0, record.inner, record.taps
            bucket.records.append(record)
            bucket.grads.append(as_matrix(param, grad, taps > 1) if record.reshaped else grad)
            record.state["step"] += 1
            for rows, cols in corners if len(corners) == 1 else reversed(corners):
                bucket.bands += (index, begin * taps, rows * taps, cols * inner)
                begin = rows
            if self.clear_grads and slot is not None:
                slot.cleared()
        return buckets.values()

    def _make_record(self, param: Tensor, grad: Tensor, names: tuple[str, ...]) -> Record:
        state = self.state[param]
        if not state:
            _check(param, grad)
            state["step"] = 0
            if param.dtype in _HALF:
                state["master"] = param.detach().to(torch.float32, copy=True)
        wide = torch.float32 if param.dtype in _HALF else param.dtype
        form = torch.channels_last if _taps_as_rows(param) > 1 else _DENSE
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=wide, memory_format=form)
        for name in {*names, "master"} & state.keys():  # were made when the parameter lay otherwise
            state[name] = state[name].contiguous(memory_format=form)
        record = self._records[id(param)] = Record(param, state, names)
        return record

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients at the cost of their staircases (at none when set to None)."""
        for group in self.param_groups:
            for param in group["params"]:
                if set_to_none:  # the slot clears its buffer when it is written next
                    param.grad = None
                elif param.grad is not None:
                    zero_gradient(param)

    def __getstate__(self) -> dict[str, Any]:
        """What torch keeps of an optimizer, and this one's options."""
        return {
            **super().__getstate__(), "update": self.update, "clear_grads": self.clear_grads
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._records = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; float32 states and masters of half-precision parameters stay float32."""
        super().load_state_dict(state_dict)
        self._records.clear()
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            saved = state_dict["state"].get(key, {})
            for name, value in saved.items():
                if isinstance(value, Tensor) and value.dtype != self.state[param][name].dtype:
                    self.state[param][name] = value.to(param.device, copy=True)


_step_with_hooks = torch.optim.Optimizer.profile_hook_step(StaircaseOptimizer._step)


def _watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks or the profiler want to know of a step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


_DENSE = torch.contiguous_format


def _check(param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise DTypeError(f"a gradient has layout {grad.layout}; allowed is torch.strided")
    if param.dtype not in _HALF + _WIDE:
        raise DTypeError(
            f"a parameter has dtype {param.dtype}; allowed are float32, float64, bfloat16, float16"
        )
    transposed = param.dim() == 2 and param.stride(1) != 1 and param.shape[1] > 1
    dense = param.is_contiguous() or _taps_as_rows(param) > 1
    if transposed or (param.dim() > 2 and not dense):
        raise StrideError(
            f"a parameter has shape {tuple(param.shape)} and strides {param.stride()}; allowed are "
            "two axes with a unit inner stride, or more that are contiguous (or channels-last)"
        )


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` that reads and scales the staircases only.

    Args:
        parameters: Parameters with gradients.
        max_norm: Largest norm allowed for all gradients together.
        norm_type: Order of the norm, ``math.inf`` included.
        error_if_nonfinite: Raise where the norm is NaN or infinite.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        OptionError: ``max_norm`` is not above 0, or a norm that is not finite was to be an error.
    """
    if not max_norm > 0:
        raise OptionError(f"max_norm={max_norm!r} must be above 0")
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    views = [  # of what counts no version: the gradients' slots need not look at them again
        view
        for param in listed
        if param.grad is not None
        for view in _views(folded(param, param.grad.data), staircase_of(param))
    ]
    if not views:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(view, norm_type) for view in views]
    device = norms[0].device
    total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise OptionError(f"the gradients' norm is {total.item()}; it must be finite to be clipped")
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for view in views:
        view.mul_(scale.to(view.device))
    return total


def _views(grad: Tensor, staircase: Staircase) -> list[Tensor]:
    if grad.dim() < 2:
        return [grad[begin:end] if grad.dim() else grad for begin, end, _ in staircase.bands()]
    return [grad[begin:end, :cols] for begin, end, cols in staircase.bands()]
