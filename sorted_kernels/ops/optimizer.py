"""Staircase optimizers: one step of AdamW or SGD on the covered part of many parameters.

Both ops update in place, and touch nothing outside ``bands``. Every list has one entry a parameter
(or none at all, see below); tensors have one or two axes, unit inner stride and any row stride,
and need not be contiguous. The dtypes of one call are uniform:

- float32 and float64 parameters: states of the same dtype, ``masters`` empty;
- bfloat16 and float16 parameters: float32 states and ``masters``; the parameter is its master,
  rounded. Gradients have the parameter's dtype or float32.

``bands`` is flat: four integers ``(tensor, row_begin, row_end, cols)`` a band. Bands of one tensor
must be disjoint. A one-dimensional tensor is a column: its rows are its elements and ``cols`` is 1.
``steps[t]`` counts parameter ``t``'s updates, this one included. SGD's ``momentums`` start as
zeros, and the list is empty when ``momentum`` is 0. ``clear_grads`` zeroes the covered part of the
gradients in the same pass. The ops do not raise the parameters' version counters.

The CPU kernel is used wherever it was compiled. On CUDA the compiled kernel waits for its GPU run,
and torch operations on views of the bands do the work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sorted_kernels import env
from sorted_kernels.ops.library import LIBRARY, NAMESPACE, load_compiled
from sorted_kernels.ops.promotion import promoted

_ADAMW = (
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] masters, int[] bands, int[] steps, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool maximize, bool clear_grads) -> ()"
)
_SGD = (
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentums, Tensor(d!)[] masters, "
    "int[] bands, float lr, float momentum, float weight_decay, bool nesterov, bool maximize, "
    "bool clear_grads) -> ()"
)


@functools.cache
def _has_cuda_kernels() -> bool:
    return load_compiled() and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NAMESPACE}::native_staircase_adamw_", "CUDA"
    )


def use_native(device_type: str) -> bool:
    """Whether the compiled optimizer kernels run on tensors of a device type.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    if device_type == "cpu":
        return load_compiled()
    allowed = promoted("staircase_optimizer") or env.experimental()
    return device_type == "cuda" and allowed and _has_cuda_kernels()


def _band_views(bands: Sequence[int], *lists: Sequence[Tensor]) -> Iterator[tuple]:
    """Yield ``(tensor index, view of each list's tensor)`` a band; an empty list gives None."""
    for i in range(0, len(bands), 4):
        index, begin, end, cols = bands[i : i + 4]
        views = [tensors[index][begin:end] if tensors else None for tensors in lists]
        yield index, *(v[:, :cols] if v is not None and v.dim() == 2 else v for v in views)


@torch.no_grad()
def adamw_fallback(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    bands: Sequence[int],
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    clear_grads: bool,
) -> None:
    """``staircase_adamw_`` in torch operations on views; same arguments."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, masters)
    for index, param, grad, exp_avg, exp_avg_sq, master in _band_views(bands, *lists):
        value = param if master is None else master
        gradient = grad.to(value.dtype)
        if maximize:
            gradient = -gradient
        correction1, correction2 = 1 - beta1 ** steps[index], 1 - beta2 ** steps[index]
        value.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(eps)
        value.addcdiv_(exp_avg, denominator, value=-lr / correction1)
        if master is not None:
            param.copy_(master)
        if clear_grads:
            grad.data.zero_()  # counts no version, as the compiled kernels do not


@torch.no_grad()
def sgd_fallback(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentums: Sequence[Tensor],
    masters: Sequence[Tensor],
    bands: Sequence[int],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    clear_grads: bool,
) -> None:
    """``staircase_sgd_`` in torch operations on views; same arguments."""
    for _, param, grad, buffer, master in _band_views(bands, params, grads, momentums, masters):
        value = param if master is None else master
        gradient = grad.to(value.dtype)
        if maximize:
            gradient = -gradient
        update = gradient.add(value, alpha=weight_decay)
        if buffer is not None:
            buffer.mul_(momentum).add_(update)
            update = update.add(buffer, alpha=momentum) if nesterov else buffer
        value.sub_(update, alpha=lr)
        if master is not None:
            param.copy_(master)
        if clear_grads:
            grad.data.zero_()  # counts no version, as the compiled kernels do not


def _register(name: str, schema: str, fallback: Callable[..., None]) -> None:
    """Define an op, and its compiled CUDA twin under a private name that Python chooses."""
    LIBRARY.define(name + schema)
    LIBRARY.define(f"native_{name}{schema}")
    native = getattr(torch.ops.sorted_kernels, f"native_{name}")

    def on_cuda(*args: object) -> None:
        (native if use_native("cuda") else fallback)(*args)

    LIBRARY.impl(name, on_cuda, "CUDA")
    if not load_compiled():
        LIBRARY.impl(name, fallback, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=LIBRARY)


_register("staircase_adamw_", _ADAMW, adamw_fallback)
_register("staircase_sgd_", _SGD, sgd_fallback)
