"""Promote the kernels that a recorded GPU run has passed: ``python -m bench.promote RESULTS``.

RESULTS is a folder that ``bench/run_gpu.sh`` wrote on a machine with a GPU. A kernel is promoted
when the run's tests of it all passed, the sanitizer found nothing, and its sources are still those
that ran.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sorted_kernels.ops import promotion

TESTS = {
    "linear": "test_triton_linear",
    "cuda_linear": "test_cuda_linear",
    "layer_norm": "test_triton_norm",
    "rms_norm": "test_triton_norm",
    "embedding": "test_triton_embedding",
    "staircase_optimizer": "test_optimizer_device",
}
SANITIZED = ("exercise", "memcheck", "racecheck")


def verdict(kernel: str, run: dict[str, Any]) -> str | None:
    """Why a run does not promote a kernel; None if it does."""
    if run["gpu"] is None:
        return "the run had no GPU"
    outcomes = {stage["stage"]: stage["outcome"] for stage in run["stages"]}
    for stage in SANITIZED:
        if outcomes.get(stage) != "passed":
            return f"{stage}: {outcomes.get(stage, 'did not run')}"
    tests = [counts for name, counts in run["tests"].items() if TESTS[kernel] in name]
    if not any(counts["passed"] for counts in tests):
        return f"no test of {TESTS[kernel]} passed"
    if any(counts["failed"] for counts in tests):
        return f"tests of {TESTS[kernel]} failed"
    if run["kernels"].get(kernel) is None:
        return "it was not compiled in the run"
    if run["kernels"][kernel] != promotion.digest(kernel):
        return "its sources have changed since"
    return None


def main(arguments: list[str] | None = None) -> None:
    """Update the record and say what became of each kernel."""
    parser = argparse.ArgumentParser(prog="python -m bench.promote", description=__doc__)
    parser.add_argument("results", type=Path)
    run = json.loads((parser.parse_args(arguments).results / "environment.json").read_text())
    record = json.loads(promotion.RECORD.read_text()) if promotion.RECORD.is_file() else {}
    for kernel in promotion.SOURCES:
        reason = verdict(kernel, run)
        print(f"{kernel}: {'promoted' if reason is None else 'experimental: ' + reason}")
        if reason is None:
            record[kernel] = run["kernels"][kernel]
    promotion.RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
