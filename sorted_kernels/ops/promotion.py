"""Which kernels a recorded GPU run has passed, by a digest of their sources.

``promoted.json`` maps a kernel to the digest that its sources had in a run whose log is committed
under ``bench/results/``. Change a source, and the kernel is experimental again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
RECORD = PACKAGE / "promoted.json"
MANIFEST = PACKAGE / "_build.json"
"""Written by the build: what was compiled, with the digests of the compiled sources."""

_TRITON = ("triton/device.py", "triton/launch.py", "triton/row_sizes.py")
SOURCES: dict[str, tuple[str, ...]] = {
    "linear": (
        *_TRITON, "triton/linear.py", "triton/ragged_linear.py", "triton/decode.py",
        "triton/gemm.py", "triton/epilogue.py", "triton/gemm_config.py", "triton/gemm_launch.py",
        "triton/autotune.py", "triton/column_sum.py",
    ),
    "layer_norm": (*_TRITON, "triton/layer_norm.py", "triton/norm.py", "triton/column_sum.py"),
    "rms_norm": (*_TRITON, "triton/rms_norm.py", "triton/norm.py", "triton/column_sum.py"),
    "batch_norm": (
        *_TRITON, "triton/batch_norm.py", "triton/channels.py", "triton/channel_sums.py",
        "triton/column_sum.py",
    ),
    "group_norm": (
        *_TRITON, "triton/group_norm.py", "triton/channels.py", "triton/channel_sums.py",
        "triton/column_sum.py",
    ),
    "conv2d": (
        *_TRITON, "triton/conv2d.py", "triton/conv_gemm.py", "triton/conv_wgrad.py",
        "triton/conv_taps.py", "triton/conv_config.py", "triton/depthwise.py",
        "triton/conv_bias_grad.py", "triton/column_sum.py", "triton/epilogue.py", "triton/gemm.py",
        "triton/gemm_config.py", "triton/gemm_launch.py", "triton/autotune.py",
    ),
    "linear_cross_entropy": (*_TRITON, "triton/linear_cross_entropy.py"),
    "embedding": (*_TRITON, "triton/embedding.py"),
    "attention": (
        "triton/device.py", "triton/launch.py", "triton/attention.py",
        "triton/attention_backward.py", "triton/attention_tile.py", "triton/attention_config.py",
    ),
    "cuda_linear": (
        "cuda/gemm.py", "cuda/linear.py", "csrc/kernels/gemm_sm90.cu",
        "csrc/kernels/gemm_sm90.cuh", "csrc/kernels/gemm_clip.cuh",
        "csrc/kernels/gemm_epilogue.cuh", "csrc/kernels/gemm_launch.h",
        "csrc/kernels/gemm_params.h", "csrc/kernels/sm90.cuh", "csrc/kernels/wgmma_sm90.cuh",
        "csrc/kernels/multiprocessors.cuh", "csrc/common/gemm_tiles.h",
        "csrc/common/half_types.h", "csrc/common/macros.h",
    ),
    "staircase_optimizer": (
        "csrc/kernels/optimizer.cu", "csrc/kernels/optimizer_kernel.cuh",
        "csrc/kernels/multiprocessors.cuh",
        "csrc/common/optimizer_update.h", "csrc/common/optimizer_table.h",
        "csrc/common/half_types.h", "csrc/common/macros.h",
    ),
}  # fmt: skip
"""Every GPU kernel family, and what its digest covers."""


def manifest() -> dict[str, Any]:
    """What the build wrote about itself; empty where nothing was compiled."""
    return json.loads(MANIFEST.read_text()) if MANIFEST.is_file() else {}


def digest_of(kernel: str, compiled: Mapping[str, str]) -> str | None:
    """SHA-256 over a kernel's sources.

    Args:
        kernel: A key of :data:`SOURCES`.
        compiled: Digests of the C++ and CUDA sources by name.

    Returns:
        None if one of its sources is not among them.
    """
    total = hashlib.sha256()
    for name in SOURCES[kernel]:
        if name.startswith("csrc/"):
            if name not in compiled:
                return None
            part = compiled[name]
        else:
            part = hashlib.sha256((PACKAGE / name).read_bytes()).hexdigest()
        total.update(f"{name} {part}\n".encode())
    return total.hexdigest()


@functools.cache
def digest(kernel: str) -> str | None:
    """:func:`digest_of` what was compiled here; None if one of its sources was not."""
    return digest_of(kernel, manifest().get("sources", {}))


def recorded() -> dict[str, str]:
    """The digest of each kernel that a recorded GPU run has passed."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


@functools.cache
def promoted(kernel: str) -> bool:
    """Whether a recorded GPU run has passed these very sources."""
    passed = recorded()
    return kernel in passed and passed[kernel] == digest(kernel)
