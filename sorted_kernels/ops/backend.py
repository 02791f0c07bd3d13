"""Which implementation runs an op: a pure function of the op, the device, and the environment."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from sorted_kernels import env
from sorted_kernels.errors import DeviceError
from sorted_kernels.ops.attention_dispatch import AttentionProblem, choose_attention
from sorted_kernels.ops.dispatch import (
    Choice,
    LinearProblem,
    Machine,
    choose_linear,
    row_regime,
)
from sorted_kernels.ops.library import load_compiled
from sorted_kernels.ops.promotion import manifest, promoted

OPS = (
    "linear", "layer_norm", "rms_norm", "embedding", "conv2d", "batch_norm", "group_norm",
    "linear_cross_entropy", "attention",
)  # fmt: skip


def has_triton() -> bool:
    """Whether Triton is installed (not whether it can run here)."""
    return importlib.util.find_spec("triton") is not None


def has_cuda_gemm() -> bool:
    """Whether the compiled GEMM could be called on a GPU that has its instructions.

    Its tiles are planned by a second compiled module, which needs nothing but a C++ compiler.
    """
    planned = importlib.util.find_spec("sorted_kernels._host") is not None
    return planned and "90a" in manifest().get("archs", ()) and load_compiled()


def _built(op: str) -> dict[str, str]:
    """The kernels of ours that could be called for an op, and their names for promotion."""
    built = {"triton": op} if has_triton() else {}
    if op == "linear" and has_cuda_gemm():
        built["cuda"] = "cuda_linear"
    return built


def choose(op: str, device_type: str) -> Choice:
    """The back end of an op on a device type, and why.

    For a linear product on CUDA, this is whether a kernel of ours may run at all, and what sums
    bias gradients; sizes have the last word on the products (:func:`linear_implementation`).

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
        setting = f"SORTED_KERNELS_BACKEND={forced}"
        if forced == "reference":
            return Choice("reference", setting)
        if op != "linear":
            return Choice("reference", f"{setting}, and {op} has no CUDA kernel")
        if device_type != "cuda":
            return Choice("reference", f"{setting}, but no cuda kernel runs on {device_type}")
        if not has_cuda_gemm():
            return Choice("reference", f"{setting}, but the CUDA kernel is not built")
        return Choice("cuda", f"{setting}, where it can run")
    if device_type != "cuda":
        return Choice("reference", "PyTorch on strided views: the CPU path")
    built = _built(op)
    for backend, kernel in built.items():
        if promoted(kernel):
            return Choice(backend, "passed a recorded GPU run")
    if built and env.experimental():
        return Choice(next(iter(built)), "experimental, turned on by SORTED_KERNELS_EXPERIMENTAL")
    if not built:
        return Choice("reference", "PyTorch on strided views: Triton is not installed")
    kernels = " and ".join({"triton": "Triton", "cuda": "CUDA"}[backend] for backend in built)
    verb = "kernel is" if len(built) == 1 else "kernels are"
    return Choice("reference", f"PyTorch on strided views: the {kernels} {verb} experimental")


@functools.cache
def _module(op: str, device_type: str) -> ModuleType:
    return importlib.import_module(f"sorted_kernels.{choose(op, device_type).backend}.{op}")


def machine(device: torch.device, op: str = "linear") -> Machine:
    """What the choice for a linear product, or for attention, depends on besides its sizes."""
    built = _built(op)
    there = device.type == "cuda" and torch.cuda.is_available()
    return Machine(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if there else None,
        forced=env.forced_backend(),
        experimental=env.experimental(),
        built=frozenset(built),
        promoted=frozenset(backend for backend, kernel in built.items() if promoted(kernel)),
        interpreter=env.triton_interpreter(),
    )


_machine = functools.cache(machine)


def linear_implementation(
    product: str,
    operands: tuple[Tensor, ...],
    m: int,
    k: int,
    activation: str = "none",
    ragged: bool = False,
) -> ModuleType:
    """The module that runs one product of a linear layer.

    Args:
        product: ``"forward"``, ``"dgrad"`` or ``"wgrad"``.
        operands: The activations (..., features) first, then whatever else has a row stride of its
            own: the parent weight, or the view that takes the gradient.
        m: Active output features; of a ragged batch, the largest row's.
        k: Active input features, likewise.
        activation: What follows the forward product.
        ragged: Whether rows have sizes of their own.
    """
    x = operands[0]
    if x.dtype is torch.float64 or _reference_only:
        return _reference("linear")
    if _module("linear", x.device.type) is _reference("linear"):  # no kernel of ours may run
        return _reference("linear")
    return _linear_module(
        product,
        row_regime(x.numel() // max(x.shape[-1], 1)),  # a key a regime, not a batch size
        m,
        k,
        x.dtype,
        tuple(map(_row_stride, operands)),
        tuple(i for i, tensor in enumerate(operands) if tensor.data_ptr() % 16 != 0),
        activation,
        ragged,
        operands[-1].dtype is torch.float32 and x.dtype is not torch.float32,
        x.device,
    )


def _row_stride(tensor: Tensor) -> int:
    """Between rows that are dense, or are made so before a kernel reads them."""
    if tensor.dim() > 1 and tensor.stride(-1) == 1:
        return tensor.stride(-2)
    return tensor.shape[-1]


@functools.lru_cache(maxsize=4096)
def _linear_module(
    product: str,
    rows: int,
    m: int,
    k: int,
    dtype: torch.dtype,
    strides: tuple[int, ...],
    misplaced: tuple[int, ...],
    activation: str,
    ragged: bool,
    widens: bool,
    device: torch.device,
) -> ModuleType:
    problem = LinearProblem(
        product, rows, m, k, dtype, strides, misplaced, activation, ragged, widens
    )
    backend = choose_linear(problem, _machine(device)).backend
    name = "reference" if backend == "library" else backend
    return importlib.import_module(f"sorted_kernels.{name}.linear")


def attention_choice(problem: AttentionProblem, device: torch.device) -> Choice:
    """The back end of an attention on a device, and why."""
    if _reference_only:
        return Choice("reference", "plain PyTorch was asked for")
    return _attention_choice(problem, device)


@functools.lru_cache(maxsize=1024)
def _attention_choice(problem: AttentionProblem, device: torch.device) -> Choice:
    return choose_attention(problem, _machine(device, "attention"))


def in_plain_torch(op: str, x: Tensor) -> bool:
    """Whether an op on a tensor is PyTorch's own here, so that no kernel of ours takes part."""
    return implementation(op, x) is _reference(op)


def in_compiled_torch(x: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """Whether compiled CPU code for these dtypes may run in place of plain PyTorch.

    Not where plain PyTorch was asked for by name.
    """
    return (
        x.dtype in dtypes and x.device.type == "cpu" and not _reference_only and _compiled_allowed()
    )


@functools.cache
def _compiled_allowed() -> bool:
    return env.forced_backend() is None and load_compiled()


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
    for cache in (_module, _machine, _linear_module, _compiled_allowed, _attention_choice):
        cache.cache_clear()
