"""``doctor``: what is installed, which back end each operation takes here, and why."""

from __future__ import annotations

import dataclasses
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
from sorted_kernels.errors import DeviceError, DTypeError, OptionError, ShapeError
from sorted_kernels.ops import backend, optimizer
from sorted_kernels.ops.dispatch import (
    DTYPES,
    PRODUCTS,
    Choice,
    LinearProblem,
    Machine,
    choose_linear,
)
from sorted_kernels.ops.library import load_compiled
from sorted_kernels.ops.promotion import PACKAGE, SOURCES, manifest, promoted
from sorted_kernels.reference.linear import ACTIVATIONS

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


def linear_problems(
    rows: int,
    full: tuple[int, int],
    active: tuple[int, int],
    dtype: str,
    activation: str = "none",
    ragged: bool = False,
) -> list[LinearProblem]:
    """The three products of a layer whose activations are dense.

    Half-precision products are followed by autocast's wgrad, whose gradient is float32.

    Args:
        rows: N.
        full: (M, K) of the parent weight.
        active: (m, k) of its block.
        dtype: Name of the element type.
        activation: What follows the forward product.
        ragged: Whether rows have sizes of their own, ``active`` being the largest.

    Raises:
        ShapeError: A size below 1, or an active one above the full one.
        DTypeError: A dtype that linear does not take.
        OptionError: An unknown activation.
    """
    names = {str(allowed).removeprefix("torch."): allowed for allowed in DTYPES}
    if dtype not in names:
        raise DTypeError(f"dtype is {dtype!r}; allowed are {', '.join(names)}")
    if activation not in ACTIVATIONS:
        raise OptionError(f"--activation is {activation!r}; allowed are {', '.join(ACTIVATIONS)}")
    if rows < 1:
        raise ShapeError(f"N is {rows}; at least 1 is needed")
    for name, size, above in zip("MK", full, active, strict=True):
        if not 1 <= above <= size:
            raise ShapeError(f"{name.lower()} is {above}; allowed are 1 to {name}, which is {size}")
    (_, weight), (dy, x) = full, active
    strides = {"forward": (x, weight), "dgrad": (dy, weight), "wgrad": (dy, x, weight)}
    problems = [
        LinearProblem(
            product,
            rows,
            *active,
            names[dtype],
            strides[product],
            activation=activation if product == "forward" else "none",
            ragged=ragged,
        )
        for product in PRODUCTS
    ]
    if names[dtype].itemsize == 2:
        problems.append(dataclasses.replace(problems[-1], widens=True))
    return problems


def machines() -> list[tuple[str, Machine]]:
    """The devices here, and two GPUs on which the same software could run."""
    here = [("here: cpu", backend.machine(torch.device("cpu")))]
    gpu = backend.machine(torch.device("cuda"))
    if torch.cuda.is_available():
        here.append((f"here: {torch.cuda.get_device_name()}", gpu))
    others = (("an sm_90 GPU", (9, 0)), ("an sm_80 GPU", (8, 0)))
    return here + [(name, dataclasses.replace(gpu, capability=c)) for name, c in others]


def explain(console: Console, problems: Iterable[LinearProblem]) -> None:
    """Print what would run each product on each machine, and why."""
    rows = []
    for problem in problems:
        for name, machine in machines():
            try:
                choice = choose_linear(problem, machine)
            except DeviceError as error:
                choice = Choice("error", str(error))
            rows.append((problem.label, name, *choice))
    console.print(_table("linear", ("product", "device", "back end", "why"), rows))


def _table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table
