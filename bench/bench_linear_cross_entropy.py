"""Cross-entropy of several exits under one head: time, and peak memory above the inputs.

B0 has the logits of all exits whole. B1 is the best of plain PyTorch: exit after exit and chunk
after chunk, each with its own forward and backward. Memory is that of a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import sorted_kernels as sk
from bench import machine, shapes
from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.shapes import HeadShape

CHUNK_BYTES = 64 << 20
Data = tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]


def _data(shape: HeadShape, dtype: torch.dtype, device: torch.device) -> Data:
    """Hidden states (E, N, k), a head of V words, targets (N,)."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(shape.E, shape.N, shape.k, generator=generator, device=device)
    head = torch.nn.Linear(shape.k, shape.V, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.normal_(std=shape.k**-0.5, generator=generator)
    target = torch.randint(shape.V, (shape.N,), generator=generator, device=device)
    return hidden.to(dtype).requires_grad_(), head, target


def _whole(hidden: torch.Tensor, head: torch.nn.Linear, target: torch.Tensor) -> None:
    F.cross_entropy(head(hidden).flatten(0, 1), target.repeat(len(hidden))).backward()


def _chunked(hidden: torch.Tensor, head: torch.nn.Linear, target: torch.Tensor) -> None:
    rows = max(64, CHUNK_BYTES // (hidden.element_size() * head.out_features))
    for states in hidden:
        for part, words in zip(states.split(rows), target.split(rows), strict=True):
            loss = F.cross_entropy(head(part), words, reduction="sum")
            (loss / (len(target) * len(hidden))).backward()


def _ours(hidden: torch.Tensor, head: torch.nn.Linear, target: torch.Tensor) -> None:
    sk.nn.LinearCrossEntropy(head)(hidden, target).mean().backward()


STEPS: dict[str, Callable[[torch.Tensor, torch.nn.Linear, torch.Tensor], None]] = {
    "B0": _whole,
    "B1": _chunked,
    "ours": _ours,
}


def _contestant(
    name: str, shape: HeadShape, dtype: torch.dtype, device: torch.device
) -> Contestant:
    hidden, head, target = _data(shape, dtype, device)

    def call() -> None:
        hidden.grad = head.weight.grad = None
        STEPS[name](hidden, head, target)

    return Contestant(call, lambda: [t.grad for t in (hidden, head.weight) if t.grad is not None])


def peak(name: str, shape: HeadShape) -> float:
    """Megabytes that a first forward and backward need above the inputs; hidden's gradient aside.

    On the CPU, in this process, which has to be a new one.
    """

    def resident() -> int:
        # Linux' own mark: the one of getrusage begins with the parent's.
        (line,) = (
            x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")
        )
        return int(line.split()[1]) << 10

    hidden, head, target = _data(shape, torch.float32, torch.device("cpu"))
    small = torch.nn.Linear(shape.k, 8, bias=False)
    STEPS[name](hidden[:1, :1].detach().requires_grad_(), small, target[:1] % 8)  # libraries' own
    before = resident()
    STEPS[name](hidden, head, target)
    return (resident() - before - hidden.nbytes) / 1e6


def _peak_elsewhere(name: str, shape: HeadShape) -> Contestant:
    """``peak`` in a process of its own."""
    sizes = [str(size) for size in (shape.E, shape.N, shape.k, shape.V)]
    command = [sys.executable, "-m", "bench.bench_linear_cross_entropy", name, *sizes]

    def call() -> float:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=machine.ROOT)
        return float(done.stdout)

    return Contestant(call)


def time_case(
    shape: HeadShape, dtype: torch.dtype, device: torch.device, names: Sequence[str]
) -> Case:
    """Forward and backward: gradients of the hidden states and of the head."""
    kernel, mode = "linear_cross_entropy", "forward+backward"
    name, gpu = str(dtype).removeprefix("torch."), device.type == "cuda"
    return Case(
        kernel=kernel,
        mode=mode,
        sizes=str(shape),
        dtype=dtype,
        contestants={name: partial(_contestant, name, shape, dtype, device) for name in names},
        device=device,
        flops=6 * shape.E * shape.N * shape.k * shape.V,
        tolerance=1e-3 if dtype == torch.float32 else 5e-2,
        goals=goals_for(kernel, mode, {}, name, gpu),
    )


def memory_case(shape: HeadShape) -> Case:
    """Peak memory of ours for all exits and for one, and with whole logits."""
    one = HeadShape(1, shape.N, shape.k, shape.V)
    asked = {"B0": ("B0", shape), "one exit": ("ours", one), "ours": ("ours", shape)}
    return Case(
        kernel="linear_cross_entropy",
        mode="memory",
        sizes=str(shape),
        dtype=torch.float32,
        contestants={name: partial(_peak_elsewhere, *what) for name, what in asked.items()},
        device=torch.device("cpu"),
        clock="memory",
        goals=goals_for("linear_cross_entropy", "memory", {}, "float32", False),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Time, in bfloat16 on a GPU; on a CPU also memory, and time of a quarter of the rows."""
    if quick or device.type == "cuda":
        shape = shapes.HEAD_QUICK if quick else shapes.HEAD
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [time_case(shape, dtype, device, tuple(STEPS))]
    rows = replace(shapes.HEAD, N=shapes.HEAD.N // 4)
    return [time_case(rows, torch.float32, device, ("B1", "ours")), memory_case(shapes.HEAD)]


def test_linear_cross_entropy(case, provider, measure):
    if case.clock != "memory":  # is not timed
        measure(case, provider)


if __name__ == "__main__":
    print(peak(sys.argv[1], HeadShape(*map(int, sys.argv[2:]))))
