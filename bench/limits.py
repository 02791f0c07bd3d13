"""What the device itself can do, measured in the run that uses it: copy bandwidth, matmul rate."""

from __future__ import annotations

import torch

from bench.harness import Case, Contestant, interleave, make_row
from bench.rows import Row, format_sizes

SECONDS = 1.0


def _copy(device: torch.device, quick: bool) -> Case:
    elements = 1 << (30 if device.type == "cuda" else 24 if quick else 26)

    def build() -> Contestant:
        source = torch.rand(elements, device=device)
        target = torch.empty_like(source)
        return Contestant(lambda: target.copy_(source))

    sizes = format_sizes(elements=elements)
    traffic = 2 * 4 * elements
    return Case(
        "limit", "copy", sizes, torch.float32, {"torch": build}, device, 0, traffic, clock="kernel"
    )


def _matmul(device: torch.device, quick: bool) -> Case:
    gpu = device.type == "cuda"
    n = 8192 if gpu else 512 if quick else 2048
    dtype = torch.bfloat16 if gpu else torch.float32

    def build() -> Contestant:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return Contestant(lambda: torch.mm(a, b, out=out))

    sizes = format_sizes(n=n)
    return Case("limit", "matmul", sizes, dtype, {"torch": build}, device, 2 * n**3, clock="kernel")


def measure(device: torch.device, quick: bool) -> list[Row]:
    """Rows ``limit copy`` (GB/s, bytes read plus written) and ``limit matmul`` (TFLOP/s)."""
    rows = []
    for case, work, metric in (
        (_copy(device, quick), 1e9, "GB/s"),
        (_matmul(device, quick), 1e12, "TFLOP/s"),
    ):
        contestants = {name: build() for name, build in case.contestants.items()}
        seconds = interleave(case, contestants, SECONDS / 4 if quick else SECONDS)["torch"]
        amount = case.bytes or case.flops
        rows.append(make_row(case, "torch", [amount / s / work for s in seconds], metric))
    return rows
