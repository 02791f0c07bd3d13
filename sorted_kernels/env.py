"""The only reader of ``SORTED_KERNELS_*`` environment variables and of Triton's own flag."""

from __future__ import annotations

import os
from pathlib import Path

from sorted_kernels.errors import OptionError

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise OptionError(f"{name}={value!r} is not a switch; use 1 or 0")


def experimental() -> bool:
    """Whether kernels that no GPU run has passed may run (``SORTED_KERNELS_EXPERIMENTAL``)."""
    return _flag("SORTED_KERNELS_EXPERIMENTAL")


def forced_backend() -> str | None:
    """Back end that every op shall use (``SORTED_KERNELS_BACKEND``): reference, triton, cuda."""
    value = os.environ.get("SORTED_KERNELS_BACKEND", "").strip().lower()
    if value in {"", "auto"}:
        return None
    if value not in {"reference", "triton", "cuda"}:
        raise OptionError(
            f"SORTED_KERNELS_BACKEND={value!r}; allowed are auto, reference, triton, cuda"
        )
    return value


def autotune() -> bool:
    """Whether GEMM tilings may be measured on the GPU (``SORTED_KERNELS_AUTOTUNE``)."""
    return _flag("SORTED_KERNELS_AUTOTUNE")


def cache_directory() -> Path:
    """Where measured tilings are kept (``SORTED_KERNELS_CACHE``, else the user's cache folder)."""
    chosen = os.environ.get("SORTED_KERNELS_CACHE", "").strip()
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(home) if home else Path.home() / ".cache") / "sorted_kernels"


def without_library() -> bool:
    """Whether to act as if the compiled library were absent (``SORTED_KERNELS_NO_LIBRARY``)."""
    return _flag("SORTED_KERNELS_NO_LIBRARY")


def triton_interpreter() -> bool:
    """Whether Triton kernels run in its interpreter (``TRITON_INTERPRET``), on CPU tensors."""
    return _flag("TRITON_INTERPRET")
