"""Which implementation runs a linear product: a pure function of what is known beforehand.

Three products share a weight ``W[:m, :k]`` of a parent ``(M, K)``: *forward* ``x @ W.T`` (x is
(N, k)), *dgrad* ``dy @ W`` (dy is (N, m)) and *wgrad* ``dW[:m, :k] += dy.T @ x``. The vendor's
library is at the limit for aligned uniform sizes. PyTorch reaches it without a copy: its own call
on a strided view gives cuBLAS the parent's row stride as the leading dimension
(``prepare_matrix_for_cublas`` in its ``aten/src/ATen/native/cuda/Blas.cpp``), so there is no
binding of our own. A kernel of this project runs where it is expected to win, and only if a
recorded GPU run has passed it or experimental kernels are on. What is expected is written down in
the constants below, and nowhere else. No GPU has confirmed them yet.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sorted_kernels.errors import DeviceError

PRODUCTS = ("forward", "dgrad", "wgrad")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

VECTOR_BYTES = 16
"""Alignment that tensor-core kernels load with. Below it cuBLAS falls to align-1 kernels."""

DECODE_ROWS = 16
"""Batches of up to this many rows only stream the weight."""

MOST_ELEMENTS = (1 << 30) - 1
"""Of an axis, for the CUDA kernel's 32-bit counts."""

DECODE_BYTES = 32 << 20
"""Active weights larger than this keep the library's kernels at the memory's bandwidth, too."""

PEAK_SHARE = {"cuda": 0.9, "triton": 0.65}
"""Rate of a kernel's large product over the library's (public marks on Hopper)."""

FLOPS_PER_BYTE = {2: 180, 4: 15}
"""Operations an H200 does while it moves a byte, by the size of an element."""


class Choice(NamedTuple):
    """A back end and the reason for it, as ``sorted-kernels doctor`` prints them."""

    backend: str
    reason: str


@dataclass(frozen=True)
class LinearProblem:
    """One product, as far as the choice depends on it.

    Attributes:
        product: One of :data:`PRODUCTS`.
        rows: N.
        out_features: m.
        in_features: k.
        dtype: Of the activations, and of the weight's block.
        strides: Row strides, in elements, of the operands that are not dense by construction: dy
            and x as far as they take part, then the weight or its gradient.
        misplaced: Those of them, by their place in ``strides``, that do not start at a multiple of
            16 bytes.
        activation: What follows the forward product; ``"none"`` for the others.
        ragged: Whether rows have sizes of their own; m and k are the largest row's.
        widens: Whether wgrad's sums go into a float32 gradient from activations of half precision.
    """

    product: str
    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    strides: tuple[int, ...]
    misplaced: tuple[int, ...] = ()
    activation: str = "none"
    ragged: bool = False
    widens: bool = False

    @property
    def label(self) -> str:
        """The product in words."""
        kind = f"ragged {self.product}" if self.ragged else self.product
        return f"{kind} into float32" if self.widens else kind

    @property
    def aligned(self) -> bool:
        """Whether every load and store of a row can be 16 bytes wide."""
        sizes = (self.out_features, self.in_features)
        whole = all(size * self.dtype.itemsize % VECTOR_BYTES == 0 for size in sizes)
        return whole and all(map(self.addressable, range(len(self.strides))))

    def addressable(self, operand: int) -> bool:
        """Whether an operand's rows start at multiples of 16 bytes, as TMA needs it."""
        row_bytes = self.strides[operand] * self.dtype.itemsize
        return operand not in self.misplaced and row_bytes % VECTOR_BYTES == 0

    @property
    def copied(self) -> tuple[str, ...]:
        """Activations that the CUDA kernel reads from a copy whose rows TMA can address."""
        names = {"forward": ("x",), "dgrad": ("dy",), "wgrad": ("dy", "x")}[self.product]
        return tuple(name for place, name in enumerate(names) if not self.addressable(place))


@dataclass(frozen=True)
class Machine:
    """A device and what the environment allows on it.

    Attributes:
        device_type: ``"cpu"``, ``"cuda"``, ...
        capability: The GPU's compute capability, None elsewhere.
        forced: What ``SORTED_KERNELS_BACKEND`` says, None for ``auto``.
        experimental: Whether kernels that no GPU run has passed may run.
        built: Kernels of this project that could be called: ``"triton"`` where Triton is
            installed, ``"cuda"`` where the compiled library has them.
        promoted: Those of them that a recorded GPU run has passed.
        interpreter: Whether Triton kernels run on CPU tensors.
    """

    device_type: str
    capability: tuple[int, int] | None = None
    forced: str | None = None
    experimental: bool = False
    built: frozenset[str] = frozenset()
    promoted: frozenset[str] = frozenset()
    interpreter: bool = False


def fused_in_features(backend: str, itemsize: int) -> float:
    """Largest k at which fusing the activation outweighs a slower product.

    Fusing saves one write and one read of y, ``2 * N * m * itemsize`` bytes; the slower product
    costs ``2 * N * m * k * (1 / share - 1)`` operations more.
    """
    return itemsize * FLOPS_PER_BYTE[itemsize] / (1 / PEAK_SHARE[backend] - 1)


def in_place_rows(backend: str) -> float:
    """Most rows at which sums that go straight into a float32 gradient outweigh a slower product.

    The library's product is written in half precision, read again and added: 4 bytes an element,
    against ``2 * N * (1 / share - 1)`` operations more.
    """
    return 4 * FLOPS_PER_BYTE[2] / (2 * (1 / PEAK_SHARE[backend] - 1))


ROW_LIMITS = (DECODE_ROWS, *sorted(map(int, map(in_place_rows, PEAK_SHARE))), MOST_ELEMENTS)
"""The batches at which a choice may change."""


def row_regime(rows: int) -> int:
    """The largest batch for which every choice is as for this one."""
    place = bisect.bisect_left(ROW_LIMITS, rows)
    return ROW_LIMITS[place] if place < len(ROW_LIMITS) else MOST_ELEMENTS + 1


def expected_to_win(backend: str, problem: LinearProblem) -> str | None:
    """Where one of our kernels should beat the library, in words; None where it should not."""
    itemsize = problem.dtype.itemsize
    if backend == "cuda" and itemsize != 2:
        return None
    if problem.ragged:  # the library needs a call for each box of the staircase
        return "rows of many sizes in one launch"
    if itemsize == 2 and not problem.aligned:
        return "odd sizes, strides or addresses"
    weight_bytes = problem.out_features * problem.in_features * itemsize
    reads_weight = problem.product != "wgrad"
    if reads_weight and problem.rows <= DECODE_ROWS and weight_bytes <= DECODE_BYTES:
        return f"at most {DECODE_ROWS} rows"
    if problem.widens and problem.rows <= in_place_rows(backend):
        return "sums straight into a float32 gradient"
    fuses = problem.activation != "none"
    if fuses and problem.in_features <= fused_in_features(backend, itemsize):
        return f"{problem.activation} is fused into a short product"
    return None


def fits_gpu(backend: str, capability: tuple[int, int] | None) -> bool:
    """Whether a GPU has the instructions of one of our kernels."""
    major = (capability or (0, 0))[0]
    return major >= 8 if backend == "triton" else capability == (9, 0)


def unavailable(backend: str, problem: LinearProblem, machine: Machine) -> str | None:
    """Why one of our kernels cannot run at all (promotion aside); None if it can."""
    if backend not in machine.built:
        return "Triton is not installed" if backend == "triton" else "the CUDA kernel is not built"
    if machine.device_type != "cuda":
        usable = backend == "triton" and machine.device_type == "cpu" and machine.interpreter
        return None if usable else f"no {backend} kernel runs on {machine.device_type} tensors"
    if not fits_gpu(backend, machine.capability):
        return f"the {backend} kernel needs {'sm_80 or newer' if backend == 'triton' else 'sm_90a'}"
    if backend == "triton":
        return None
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return "the CUDA kernel takes bfloat16 and float16"
    if max(problem.rows, problem.out_features, problem.in_features) > MOST_ELEMENTS:
        return f"the CUDA kernel takes sizes up to {MOST_ELEMENTS}"
    # Activations that TMA cannot address are copied; a weight never is. TMA does not write wgrad's.
    if problem.product != "wgrad" and not problem.addressable(len(problem.strides) - 1):
        return "TMA needs the weight's base and row stride at multiples of 16 bytes"
    return None


def choose_linear(problem: LinearProblem, machine: Machine) -> Choice:
    """The back end of one product, and why.

    Returns:
        ``library``: PyTorch on strided views, because nothing is expected to beat it.
        ``cuda`` or ``triton``: our kernel. ``reference``: the same PyTorch code as ``library``, in
        place of a kernel that may not run, because it was asked for, or as the float64 oracle.

    Raises:
        DeviceError: ``SORTED_KERNELS_BACKEND=triton`` where Triton cannot run.
    """
    if problem.dtype is torch.float64:
        return Choice("reference", "float64 is the oracle's dtype; no kernel takes it")
    if machine.forced is not None:
        return _forced(problem, machine)
    if machine.device_type != "cuda":
        name = "oneDNN or MKL" if machine.device_type == "cpu" else machine.device_type
        return Choice("library", f"PyTorch ({name}) on strided views")
    waiting, gains = [], []
    for backend in ("cuda", "triton"):
        gain = expected_to_win(backend, problem)
        if gain is None or not fits_gpu(backend, machine.capability):
            continue
        obstacle = unavailable(backend, problem, machine)
        if obstacle is None and backend in machine.promoted:
            return Choice(backend, gain + _copies(backend, problem))
        if obstacle is None and machine.experimental:
            return Choice(backend, f"{gain}{_copies(backend, problem)} (experimental)")
        gains.append(gain)
        waiting.append(obstacle or f"the {backend} kernel is experimental")
    if waiting:
        return Choice("reference", f"{gains[0]}, but {'; '.join(waiting)}: cuBLAS it is")
    return Choice("library", "cuBLAS on strided views: nothing is expected to beat it")


def _copies(backend: str, problem: LinearProblem) -> str:
    if backend != "cuda" or not problem.copied:
        return ""
    return f"; {' and '.join(problem.copied)} copied into aligned rows"


def _forced(problem: LinearProblem, machine: Machine) -> Choice:
    setting = f"SORTED_KERNELS_BACKEND={machine.forced}"
    if machine.forced == "reference":
        return Choice("reference", setting)
    assert machine.forced is not None
    obstacle = unavailable(machine.forced, problem, machine)
    if obstacle is None:
        return Choice(machine.forced, setting + _copies(machine.forced, problem))
    if machine.forced == "triton":
        raise DeviceError(f"{setting}, but {obstacle}")
    return Choice("reference", f"{setting}, but {obstacle}")
