"""``python -m bench``: run the benchmarks side by side, write CSV rows, print ratios and goals."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import torch

from bench import (
    bench_anytime,
    bench_attention,
    bench_conv,
    bench_host,
    bench_kernels,
    bench_linear_cross_entropy,
    bench_linear_step,
    bench_llama_block,
    bench_model_step,
    bench_ragged,
    bench_resnet_step,
    limits,
    machine,
    table,
)
from bench.harness import Case, run_case
from bench.rows import append_rows

FAMILIES = {
    "linear_step": bench_linear_step.cases,
    "model_step": bench_model_step.cases,
    "resnet_step": bench_resnet_step.cases,
    "transformer_step": bench_llama_block.cases,
    "conv": bench_conv.cases,
    "anytime": bench_anytime.cases,
    "ragged": bench_ragged.cases,
    "attention": bench_attention.cases,
    "kernels": bench_kernels.cases,
    "linear_cross_entropy": bench_linear_cross_entropy.cases,
    "host": bench_host.cases,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets benchmarks.csv")
    parser.add_argument("--device", default=machine.best_device().type, choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see it work")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--seconds", type=float, help="stop starting cases after this long (default: run them all)"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Run what was asked for; 0 if every case ran and its contestants agreed."""
    if options.threads:
        torch.set_num_threads(options.threads)
    machine.keep_freed_memory()
    device = torch.device(options.device)
    path = options.out / "benchmarks.csv"
    start = time.perf_counter()
    print(f"device {machine.device_name(device.type)}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} CPU threads, commit {machine.commit()}, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} (others' work disturbs the times)")

    limit_rows = limits.measure(device, options.quick)
    append_rows(path, limit_rows)
    known = {row.mode: row.p50 for row in limit_rows}
    print(f"limits: copy {known['copy']:.0f} GB/s, matmul {known['matmul']:.3g} TFLOP/s\n")

    cases = [case for family in options.only for case in FAMILIES[family](device, options.quick)]
    each = 0.3 if options.quick else 1.0 if device.type == "cuda" else 3.0
    failures, left_out = [], []
    for case in cases:
        if options.seconds is not None and time.perf_counter() - start > options.seconds:
            left_out.append(case)
        elif not _run_one(case, each, path, known):
            failures.append(case)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{len(cases)} cases, {time.perf_counter() - start:.0f} s, rows in {path}")
    for what, which in (("FAILED", failures), ("LEFT OUT for lack of time", left_out)):
        for case in which:
            print(f"{what}: {case}")
    return 1 if failures or left_out else 0


def _run_one(case: Case, seconds: float, path: Path, known: dict[str, float]) -> bool:
    """Time one case and report it; a case that fails leaves the others alone."""
    begin, preempted = time.perf_counter(), _preemptions()
    try:
        rows = run_case(case, seconds)
    except Exception as error:  # a compiler's errors have no common class
        print(f"{case}\n    FAILED: {type(error).__name__}: {error}", flush=True)
        return False
    append_rows(path, rows)
    preemptions = (_preemptions() - preempted) / (time.perf_counter() - begin)
    print("\n".join(table.describe(case, rows, known, preemptions)), flush=True)
    return True


def _preemptions() -> int:
    """Involuntary context switches of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


if __name__ == "__main__":
    sys.exit(run(parse()))
