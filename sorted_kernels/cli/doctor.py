"""``doctor``: what is installed, which back end each operation takes here, and why."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.table import Table

from sorted_kernels import env
from sorted_kernels.errors import DeviceError
from sorted_kernels.ops import backend, optimizer
from sorted_kernels.ops.library import load_compiled
from sorted_kernels.ops.promotion import PACKAGE, SOURCES, manifest, promoted

PACKAGES = ("triton", "numpy", "safetensors", "matplotlib", "rich", "typer", "scikit-learn")


def installed() -> list[tuple[str, str]]:
    """Name and state of each thing that the library uses."""
    return [
        ("sorted_kernels", _version("sorted_kernels") or f"from {PACKAGE}"),
        ("compiled library", _library()),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not in it'})"),
        ("GPU", _gpu()),
        ("nvcc", _nvcc()),
        *((package, _version(package) or "not installed") for package in PACKAGES),
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library() -> str:
    if env.without_library():
        return "off: SORTED_KERNELS_NO_LIBRARY is set"
    if not load_compiled():
        return "none (pure Python)"
    built = manifest()
    if built.get("cuda"):
        return f"CPU and CUDA kernels (sm_{', sm_'.join(built['archs'])}; nvcc {built['nvcc']})"
    return f"CPU kernels ({built.get('cxx', 'unknown compiler')}); no CUDA kernels"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not on PATH"
    printed = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release ([\d.]+)", printed.stdout)
    return f"{release.group(1)} ({path})" if release else path


def back_ends() -> list[tuple[str, str, str, str]]:
    """Operation, device, back end and reason, for the CPU and for CUDA."""
    rows = []
    for device in ("cpu", "cuda"):
        there = device == "cpu" or torch.cuda.is_available()
        name = device if there else f"{device} (none here)"
        for op in backend.OPS:
            try:
                choice = backend.choose(op, device)
            except DeviceError as error:
                choice = backend.Choice("error", str(error))
            rows.append((op, name, *choice))
        rows.append(("AdamW, SGD", name, *_optimizer(device)))
    return rows


def _optimizer(device: str) -> backend.Choice:
    if optimizer.use_native(device):
        passed = device == "cpu" or promoted("staircase_optimizer")
        return backend.Choice("native", "compiled" if passed else "compiled, experimental")
    if not load_compiled():
        reason = "no compiled library"
    elif not manifest().get("cuda"):
        reason = "the compiled library has no CUDA kernels"
    else:
        reason = "the CUDA kernel is experimental"
    return backend.Choice("reference", f"PyTorch on band views: {reason}")


def report(console: Console) -> None:
    """Print everything."""
    console.print(_table("Installed", ("what", "state"), installed()))
    headings = ("operation", "device", "back end", "why")
    console.print(_table("Back ends", headings, back_ends()))
    waiting = [kernel for kernel in SOURCES if not promoted(kernel)]
    switch = "on" if env.experimental() else "off"
    console.print(
        f"Experimental (no recorded GPU run has passed them): {', '.join(waiting) or 'none'}.\n"
        f"SORTED_KERNELS_EXPERIMENTAL is {switch}."
    )


def _table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table
