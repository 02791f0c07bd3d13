"""What the numbers were measured on: device, versions, commit."""

from __future__ import annotations

import ctypes
import datetime
import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def device_name(device_type: str) -> str:
    """Name of the GPU, or of the CPU."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for all contestants alike.

    It hands the end of the heap back to the system whenever that is free. Whether a step ends so is
    chance: it depends on where some small tensor lies. A training step of a small convolutional
    network then has none or 7000 page faults, a tenth of its time, be it torch's or ours.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        adjust(trim_threshold, 1 << 30)
        adjust(mmap_threshold, 32 << 20)  # the most it allows


def output_of(*command: str) -> str | None:
    """Standard output of a command run in the repository, or None where it fails or is absent."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def commit() -> str:
    """The commit measured, ``-dirty`` if tracked files differ from it.

    ``BENCH_COMMIT`` names it where there is no git.
    """
    named = os.environ.get("BENCH_COMMIT")
    if named:
        return named
    head = output_of("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changes = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changes else head


def today() -> str:
    """The date, ISO, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
