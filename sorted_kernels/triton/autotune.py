"""Measured tilings, kept on disk: a bucket of shapes is measured once for a GPU and a Triton.

Off unless ``SORTED_KERNELS_AUTOTUNE=1`` and a GPU is there; then a bucket's first launch measures
all supported tilings. Sizes count as the power of two above them, so no other size in the bucket is
measured again, by this process or a later one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sorted_kernels import env
from sorted_kernels.triton.gemm_config import GemmConfig, size_bucket, supported_configs
from sorted_kernels.triton.launch import device_limits

Timer = Callable[[Callable[[], object]], float]
"""How long a call takes, in any unit."""


class GemmShape(NamedTuple):
    """What a kernel is launched on."""

    kernel: str
    rows: int
    cols: int
    reduction: int
    dtype: str
    aligned: bool

    def bucket(self) -> str:
        """The name of all shapes that share a tiling."""
        sizes = "x".join(str(size_bucket(s)) for s in (self.rows, self.cols, self.reduction))
        dtype, alignment = self.dtype.removeprefix("torch."), "aligned" if self.aligned else "odd"
        return f"{self.kernel} {sizes} {dtype} {alignment}"


class Tuner:
    """Finds the fastest tiling of a bucket, and remembers it in a JSON file.

    Args:
        path: The file; it may be missing, and its folder too. Others may write to it at any time.
        timer: Measures a call.
    """

    def __init__(self, path: Path, timer: Timer) -> None:
        self._path, self._timer = path, timer
        self._known: dict[str, GemmConfig] = {}

    def config(
        self,
        shape: GemmShape,
        candidates: Sequence[GemmConfig],
        run: Callable[[GemmConfig], object],
    ) -> GemmConfig:
        """The tiling of a shape's bucket, measured if nobody has done so before.

        Args:
            shape: What will be launched.
            candidates: Tilings that the device supports; what a file names beside them is ignored.
            run: Launches on arguments that may be written any number of times.
        """
        bucket = shape.bucket()
        found = self._known.get(bucket)
        if found is None:
            found = self._read().get(bucket)
        if found not in candidates:
            found = min(candidates, key=lambda config: self._measure(run, config))
            self._write(bucket, found)
        assert found is not None  # it is a candidate
        self._known[bucket] = found
        return found

    def _measure(self, run: Callable[[GemmConfig], object], config: GemmConfig) -> float:
        try:
            return self._timer(lambda: run(config))
        except OutOfResources:
            return float("inf")

    def _read(self) -> dict[str, GemmConfig]:
        try:
            entries = json.loads(self._path.read_text())
            return {bucket: GemmConfig(**config) for bucket, config in entries.items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"{self._path} is not a file of tilings ({error}); ignored", stacklevel=2)
            return {}

    def _write(self, bucket: str, config: GemmConfig) -> None:
        """Add an entry. A reader sees a whole file; of two writers, neither's entry is lost."""
        temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path.with_name(f"{self._path.name}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                entries = {**self._read(), bucket: config}
                text = {name: asdict(entry) for name, entry in sorted(entries.items())}
                temporary.write_text(json.dumps(text, indent=1) + "\n")
                os.replace(temporary, self._path)
        except OSError as error:
            warnings.warn(f"{self._path} cannot be written ({error})", stacklevel=2)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def cache_file(device_name: str) -> Path:
    """Where the tilings of a GPU are kept: one file for each device name and Triton version."""
    name = re.sub(r"[^\w.-]+", "_", f"{device_name}-triton-{triton.__version__}")
    return env.cache_directory() / "autotune" / f"{name}.json"


def _time_on_gpu(call: Callable[[], object]) -> float:
    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


@functools.cache
def _tuner(device_index: int) -> Tuner:
    return Tuner(cache_file(torch.cuda.get_device_name(device_index)), _time_on_gpu)


@functools.cache
def _wanted() -> bool:
    return env.autotune()


def enabled(device: torch.device) -> bool:
    """Whether launches on a device may be tuned (asked for once a process)."""
    return device.type == "cuda" and _wanted() and not torch.cuda.is_current_stream_capturing()


def tuned(
    shape: GemmShape,
    like: Tensor,
    run: Callable[[GemmConfig], object],
    candidates: Sequence[GemmConfig] = (),
) -> GemmConfig:
    """The measured tiling of a shape for an operand's device; see :class:`Tuner`.

    Without candidates of its own, a shape has those of a plain product.
    """
    limits = device_limits(like.device)
    if not candidates:
        candidates = supported_configs(size_bucket(shape.rows), like.dtype, limits, shape.aligned)
    return _tuner(like.device.index).config(shape, candidates, run)
