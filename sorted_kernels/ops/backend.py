"""Which implementation runs an op: a pure function of the op, the device, and the environment."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sorted_kernels import env
from sorted_kernels.errors import DeviceError

OPS = ("linear", "layer_norm", "rms_norm", "embedding")
_PACKAGE = Path(__file__).parent.parent
_PROMOTED = _PACKAGE / "promoted.json"


class Choice(NamedTuple):
    """A back end and the reason for it, as ``sorted-kernels doctor`` prints them."""

    backend: str
    reason: str


def has_triton() -> bool:
    """Whether Triton is installed (not whether it can run here)."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def promoted(kernel: str) -> bool:
    """Whether a recorded GPU run has passed this very source of a kernel.

    Args:
        kernel: Path of its source below the package, for example ``triton/linear.py``.
    """
    recorded = json.loads(_PROMOTED.read_text()) if _PROMOTED.is_file() else {}
    source = _PACKAGE / kernel
    return source.is_file() and recorded.get(kernel) == digest(source)


def digest(source: Path) -> str:
    """SHA-256 of a kernel's source, the key of its promotion."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


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
    if promoted(f"triton/{op}.py"):
        return Choice("triton", "passed a recorded GPU run")
    if env.experimental():
        return Choice("triton", "experimental, turned on by SORTED_KERNELS_EXPERIMENTAL")
    return Choice("reference", "PyTorch on strided views: the Triton kernel is experimental")


@functools.cache
def _module(op: str, device_type: str) -> ModuleType:
    return importlib.import_module(f"sorted_kernels.{choose(op, device_type).backend}.{op}")


_reference_only = False


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Within the block every op runs as plain PyTorch, so that its tools can look inside."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


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
    _module.cache_clear()
    promoted.cache_clear()
