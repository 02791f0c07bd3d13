"""Which implementation runs an attention: a pure function, as for linear products.

PyTorch's own attention (cuDNN, FlashAttention) on views of the active heads is at the limit where
all samples have the same heads. A kernel of this project runs where PyTorch would need several
launches, or would write a matrix of all scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sorted_kernels.errors import DeviceError
from sorted_kernels.ops.dispatch import Choice, Machine, fits_gpu

HEAD_DIMS = (32, 128)
"""Smallest and largest head that the Triton kernels take."""


@dataclass(frozen=True)
class AttentionProblem:
    """One attention, as far as the choice depends on it.

    Attributes:
        head_fits: Whether D is one of :data:`HEAD_DIMS` or between them.
        dtype: Of q, k and v.
        per_sample: Whether each sample has its own number of heads.
        causal: Whether a row attends to no later column.
        masked: Whether there is a mask.
        mask_trains: Whether the mask wants a gradient.
        unit_strides: Whether the heads' rows are dense.
    """

    head_fits: bool
    dtype: torch.dtype
    per_sample: bool = False
    causal: bool = False
    masked: bool = False
    mask_trains: bool = False
    unit_strides: bool = True


def gain_of(problem: AttentionProblem) -> str | None:
    """Where our kernel should beat PyTorch's, in words; None where it should not."""
    if problem.per_sample:
        return "heads a sample in one launch"
    if problem.causal and problem.masked:
        return "causal and a mask without the mask of both"
    return None


def obstacle_of(problem: AttentionProblem, machine: Machine) -> str | None:
    """Why our kernel cannot run at all (promotion aside); None if it can."""
    if "triton" not in machine.built:
        return "Triton is not installed"
    if machine.device_type != "cuda":
        if not (machine.device_type == "cpu" and machine.interpreter):
            return f"no triton kernel runs on {machine.device_type} tensors"
    elif not fits_gpu("triton", machine.capability):
        return "the triton kernel needs sm_80 or newer"
    return None


def unfit(problem: AttentionProblem) -> str | None:
    """Why our kernel cannot take a problem on any machine; None if it can."""
    if problem.dtype is torch.float64:
        return "float64 is the oracle's dtype; no kernel takes it"
    if not problem.head_fits:
        return f"the triton kernel takes heads of {HEAD_DIMS[0]} to {HEAD_DIMS[1]} features"
    if problem.mask_trains:
        return "the triton kernel has no gradient of the mask"
    if not problem.unit_strides:
        return "the triton kernel needs a unit inner stride"
    return None


def choose_attention(problem: AttentionProblem, machine: Machine) -> Choice:
    """The back end of one attention, and why.

    Returns:
        ``library``: PyTorch's attention on views of the heads, because nothing is expected to beat
        it. ``triton``: our kernel. ``reference``: the same PyTorch code as ``library``, in place of
        a kernel that may not run, or because it was asked for.

    Raises:
        DeviceError: ``SORTED_KERNELS_BACKEND=triton`` where Triton cannot run.
    """
    misfit = unfit(problem)
    obstacle = misfit or obstacle_of(problem, machine)
    if machine.forced is not None:
        setting = f"SORTED_KERNELS_BACKEND={machine.forced}"
        if machine.forced != "triton":
            return Choice("reference", setting)
        if obstacle is None:
            return Choice("triton", setting)
        if misfit is None:
            raise DeviceError(f"{setting}, but {obstacle}")
        return Choice("reference", f"{setting}, but {misfit}")
    gain = gain_of(problem) if machine.device_type == "cuda" else None
    if gain is None:
        return Choice("library", "PyTorch's attention on views of the heads")
    if obstacle is None and "triton" in machine.promoted:
        return Choice("triton", gain)
    if obstacle is None and machine.experimental:
        return Choice("triton", f"{gain} (experimental)")
    return Choice("reference", f"{gain}, but {obstacle or 'the triton kernel is experimental'}")
