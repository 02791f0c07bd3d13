"""Which implementation runs an op: a pure function of the op, the device, and the environment."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sorted_kernels import env
from sorted_kernels.errors import DeviceError
from sorted_kernels.ops.promotion import promoted

OPS = ("linear", "layer_norm", "rms_norm", "embedding")


class Choice(NamedTuple):
    """A back end and the reason for it, as ``sorted-kernels doctor`` prints them."""

    backend: str
    reason: str


def has_triton() -> bool:
    """Whether Triton is installed (not whether it can run here)."""
    return importlib.util.find_spec("triton") is not None


def choose(op: str, device_type: str) -> Choice:
    """The back end of an op on a device type, and why.

    Raises:
        DeviceError: ``SORTED_KERNELS_BACKEND`` asks for one that cannot run here.
    """
    forced = env.forced_backend()
    if forced == "triton":
        if not has_triton():
            raise DeviceError("SORTED_KERNELS_BACKEND=triton, but Triton is not installed")
        if device_type == "cpu" and not env.triton_interpreter():
            raise DeviceError(
                "SORTED_KERNELS_BACKEND=triton on CPU tensors needs TRITON_INTERPRET=1"
            )
        return Choice("triton", "SORTED_KERNELS_BACKEND=triton")
    if forced is not None:
        return Choice("reference", f"SORTED_KERNELS_BACKEND={forced}, and {op} has no CUDA kernel")
    if device_type != "cuda":
        return Choice("reference", "PyTorch on strided views: the CPU path")
    if not has_triton():
        return Choice("reference", "PyTorch on strided views: Triton is not installed")
    if promoted(op):
        return Choice("triton", "passed a recorded GPU run")
    if env.experimental():
        return Choice("triton", "experimental, turned on by SORTED_KERNELS_EXPERIMENTAL")
    return Choice("reference", "PyTorch on strided views: the Triton kernel is experimental")


@functools.cache
def _module(op: str, device_type: str) -> ModuleType:
    return importlib.import_module(f"sorted_kernels.{choose(op, device_type).backend}.{op}")


def in_plain_torch(op: str, x: Tensor) -> bool:
    """Whether an op on a tensor is PyTorch's own here, so that no kernel of ours takes part."""
    return implementation(op, x) is _reference(op)


_reference_only = False
_generation = 0


def generation() -> int:
    """Changes with whatever could change a choice, so that what hangs on one can be kept."""
    return _generation


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Within the block every op runs as plain PyTorch, so that its tools can look inside."""
    global _reference_only, _generation
    before, _reference_only = _reference_only, True
    _generation += 1
    try:
        yield
    finally:
        _reference_only = before
        _generation += 1


def implementation(op: str, x: Tensor) -> ModuleType:
    """The module that runs an op on an input; the choice is made once a process."""
    if x.dtype is torch.float64 or _reference_only:  # no kernel has the oracle's dtype
        return _reference(op)
    return _module(op, x.device.type)


@functools.cache
def _reference(op: str) -> ModuleType:
    return importlib.import_module(f"sorted_kernels.reference.{op}")


def reset() -> None:
    """Forget the choices made, so that a changed environment is read again (for tests)."""
    global _generation
    _generation += 1
    _module.cache_clear()
