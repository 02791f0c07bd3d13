"""What the staircase optimizers share: which part of each parameter a step moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sorted_kernels.errors import DTypeError, OptionError, ShapeError
from sorted_kernels.ops.gradient import slot_if_any, staircase_of, zero_gradient
from sorted_kernels.staircase import Staircase

UPDATES = ("active", "whole")
_HALF = (torch.bfloat16, torch.float16)
_WIDE = (torch.float32, torch.float64)


class Bucket:
    """Parameters of one group that share device and dtypes, as the ops take them."""

    __slots__ = ("params", "grads", "masters", "states", "bands", "steps")

    def __init__(self, state_count: int) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.states: list[list[Tensor]] = [[] for _ in range(state_count)]
        self.bands: list[int] = []
        self.steps: list[int] = []

    def add(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        names: tuple[str, ...],
        corners: list[tuple[int, int]],
    ) -> None:
        """Append one parameter; trailing axes beyond the second become columns."""
        index, begin, inner = len(self.params), 0, 1
        states = [state[name] for name in names]
        master = state.get("master")
        if param.dim() > 2:
            inner = param[0, 0].numel()
            param, grad, *states = (t.flatten(1) for t in (param, grad, *states))
            master = None if master is None else master.flatten(1)
        self.params.append(param)
        self.grads.append(grad)
        for held, tensor in zip(self.states, states, strict=True):
            held.append(tensor)
        if master is not None:
            self.masters.append(master)
        self.steps.append(state["step"])
        for rows, cols in reversed(corners):
            self.bands += (index, begin, rows, cols * inner)
            begin = rows


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
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: Computes the loss again and returns it, as in torch.

        Raises:
            DTypeError: A sparse gradient, or a parameter that is not floating.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for bucket in self._collect(group):
                self._apply(group, bucket)
                increment_version(bucket.params)
        return loss

    def _apply(self, group: dict[str, Any], bucket: Bucket) -> None:
        raise NotImplementedError

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.STATES

    def _collect(self, group: dict[str, Any]) -> Iterable[Bucket]:
        """Gather gradients, states and bands: the host time of a step."""
        names = self._state_names(group)
        buckets: dict[tuple[torch.device, torch.dtype, torch.dtype], Bucket] = {}
        whole = self.update == "whole"
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            slot = slot_if_any(param)
            if slot is None or grad is not slot.buffer:
                slot, corners = None, staircase_of(param).corners
            else:
                corners = slot.staircase.corners
            if whole:
                corners = [(param.shape[0], param.shape[1] if param.dim() > 1 else 1)]
            elif not corners:
                continue
            state = self.state[param]
            if not state:
                _check(param, grad)
                self._init_state(param, state, names)
            state["step"] += 1
            key = (param.device, param.dtype, grad.dtype)
            bucket = buckets.get(key)
            if bucket is None:
                bucket = buckets[key] = Bucket(len(names))
            bucket.add(param, grad, state, names, corners)
            if self.clear_grads and slot is not None:
                slot.cleared()
        return buckets.values()

    def _init_state(self, param: Tensor, state: dict[str, Any], names: tuple[str, ...]) -> None:
        state["step"] = 0
        wide = torch.float32 if param.dtype in _HALF else param.dtype
        for name in names:
            state[name] = torch.zeros_like(param, dtype=wide, memory_format=_DENSE)
        if param.dtype in _HALF:
            state["master"] = param.detach().to(torch.float32, copy=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients at the cost of their staircases (at none when set to None)."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    zero_gradient(param, set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; float32 states and masters of half-precision parameters stay float32."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            saved = state_dict["state"].get(key, {})
            for name, value in saved.items():
                if isinstance(value, Tensor) and value.dtype != self.state[param][name].dtype:
                    self.state[param][name] = value.to(param.device, copy=True)


_DENSE = torch.contiguous_format


def _check(param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise DTypeError(f"a gradient has layout {grad.layout}; allowed is torch.strided")
    if param.dtype not in _HALF + _WIDE:
        raise DTypeError(
            f"a parameter has dtype {param.dtype}; allowed are float32, float64, bfloat16, float16"
        )
    if param.dim() == 0 or (param.dim() > 2 and not param.is_contiguous()):
        raise ShapeError(
            f"a parameter has shape {tuple(param.shape)} and strides {param.stride()}; allowed are "
            "one or two axes with a unit inner stride, or more that are contiguous"
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
    views = [
        view
        for param in listed
        if param.grad is not None
        for view in _views(param.grad, staircase_of(param))
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
    grad = grad.detach()
    if grad.dim() < 2:
        return [grad[begin:end] if grad.dim() else grad for begin, end, _ in staircase.bands()]
    return [grad[begin:end, :cols] for begin, end, cols in staircase.bands()]
