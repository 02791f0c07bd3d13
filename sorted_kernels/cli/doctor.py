"""``doctor``: what is installed, which back end each operation takes here, and why."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from typing import Any

import torch

from sorted_kernels import env
from sorted_kernels.errors import DeviceError
from sorted_kernels.ops import backend, optimizer
from sorted_kernels.ops.library import load_compiled
from sorted_kernels.ops.promotion import SOURCES, manifest, promoted


def installed() -> list[tuple[str, str]]:
    """Name and state of each thing that the library uses."""
    rows = [("python", platform.python_version()), ("torch", torch.__version__)]
    for package in ("triton", "numpy", "safetensors", "matplotlib", "rich", "scikit-learn"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees"
    built = manifest()
    if not load_compiled():
        library = "none (pure Python)"
    elif built.get("cuda"):
        library = f"CPU and CUDA kernels (sm_{', sm_'.join(built['archs'])}; nvcc {built['nvcc']})"
    else:
        library = f"CPU kernels ({built.get('cxx', 'unknown compiler')}); no CUDA kernels"
    rows += [("GPU", gpu), ("nvcc", shutil.which("nvcc") or "not on PATH")]
    return [*rows, ("compiled library", library)]


def back_ends() -> list[tuple[str, str, str, str]]:
    """Operation, device, back end and reason, for the CPU and for CUDA."""
    rows = []
    for device in ("cpu", "cuda"):
        there = device == "cpu" or torch.cuda.is_available()
        for op in backend.OPS:
            try:
                choice = backend.choose(op, device)
            except DeviceError as error:
                choice = backend.Choice("error", str(error))
            rows.append((op, device if there else f"{device} (none here)", *choice))
        native = optimizer.use_native(device)
        reason = "compiled" if native else "PyTorch on band views: " + (
            "nothing was compiled" if device == "cpu" else "the CUDA kernel is experimental"
        )  # fmt: skip
        name = device if there else f"{device} (none here)"
        rows.append(("AdamW, SGD", name, "native" if native else "reference", reason))
    return rows


def report(console: Any, table: Any) -> None:
    """Print everything with rich's console and table class."""
    what = table(title="Installed")
    for heading in ("what", "state"):
        what.add_column(heading)
    for row in installed():
        what.add_row(*row)
    console.print(what)
    ops = table(title="Back ends")
    for heading in ("operation", "device", "back end", "why"):
        ops.add_column(heading)
    for line in back_ends():
        ops.add_row(*line)
    console.print(ops)
    waiting = [kernel for kernel in SOURCES if not promoted(kernel)]
    switch = "on" if env.experimental() else "off"
    console.print(
        f"Experimental (no recorded GPU run has passed them): {', '.join(waiting) or 'none'}.\n"
        f"SORTED_KERNELS_EXPERIMENTAL is {switch}."
    )
