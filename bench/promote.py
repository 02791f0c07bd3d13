"""Promote the kernels that a recorded GPU run has passed: ``python -m bench.promote RESULTS``.

RESULTS is a folder that ``bench/run_gpu.sh`` wrote on a machine with a GPU, logs and all. A kernel
is promoted when the run's tests of it all passed, the sanitizer found nothing, and the sources
built here are those that ran. The exit code is 0 if a kernel was promoted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.rows import replace_file
from sorted_kernels.ops import promotion

TESTS: dict[str, tuple[str, ...]] = {
    "linear": ("test_triton_linear", "test_triton_linear_decode", "test_triton_linear_ragged"),
    "cuda_linear": ("test_cuda_linear", "test_cuda_linear_ops"),
    "layer_norm": ("test_triton_norm", "test_triton_norm_ragged"),
    "rms_norm": ("test_triton_norm", "test_triton_norm_ragged"),
    "batch_norm": ("test_triton_channel_norm",),
    "group_norm": ("test_triton_channel_norm",),
    "conv2d": ("test_triton_conv2d",),
    "embedding": ("test_triton_embedding", "test_triton_embedding_ragged"),
    "attention": ("test_triton_attention",),
    "linear_cross_entropy": ("test_triton_linear_cross_entropy",),
    "staircase_optimizer": ("test_optimizer_device",),
}
"""The test files of each kernel that run on a GPU; some test of each must have passed there."""
SANITIZED = ("exercise", "memcheck", "racecheck")
EVIDENCE = ("tests.log", "sanitizer.log", "benchmarks.csv")


def read_run(results: Path) -> dict[str, Any]:
    """What ``environment.json`` of a recorded run says.

    Raises:
        ValueError: A file of the run is missing or empty, or is not what ``run_gpu.sh`` writes.
    """
    for name in ("environment.json", *EVIDENCE):
        if not (results / name).is_file() or not (results / name).stat().st_size:
            raise ValueError(f"{results / name} is missing or empty: not a recorded run")
    path = results / "environment.json"
    run = json.loads(path.read_text())  # its error is a ValueError too
    missing = {"gpu", "stages", "tests", "kernels"} - set(run)
    if missing:
        raise ValueError(f"{path} does not say: {', '.join(sorted(missing))}")
    return run


def _tests_of(module: str, run: dict[str, Any]) -> list[dict[str, Any]]:
    return [counts for name, counts in run["tests"].items() if module in name.split(".")]


def verdict(kernel: str, run: dict[str, Any]) -> str | None:
    """Why a run does not promote a kernel; None if it does."""
    if run["gpu"] is None:
        return "the run had no GPU"
    outcomes = {stage["stage"]: stage["outcome"] for stage in run["stages"]}
    for stage in SANITIZED:
        if outcomes.get(stage) != "passed":
            return f"{stage}: {outcomes.get(stage, 'did not run')}"
    for module in TESTS[kernel]:
        tests = _tests_of(module, run)
        if not any(counts["passed"] for counts in tests):
            return f"no test of {module} passed"
        if any(counts["failed"] for counts in tests):
            return f"tests of {module} failed"
    if run["kernels"].get(kernel) is None:
        return "the run did not use it"
    if promotion.digest(kernel) is None:
        return "it is not compiled here, so that its sources cannot be compared"
    if run["kernels"][kernel] != promotion.digest(kernel):
        return "its sources are not those of the run"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Update the record and say what became of each kernel; 0 if one was promoted."""
    parser = argparse.ArgumentParser(prog="python -m bench.promote", description=__doc__)
    parser.add_argument("results", type=Path)
    options = parser.parse_args(arguments)
    try:
        run = read_run(options.results)
        record = json.loads(promotion.RECORD.read_text()) if promotion.RECORD.is_file() else {}
    except ValueError as error:
        print(f"nothing promoted: {error}", file=sys.stderr)
        return 2
    reasons = {kernel: verdict(kernel, run) for kernel in promotion.SOURCES}
    for kernel, reason in reasons.items():
        print(f"{kernel}: {'promoted' if reason is None else 'experimental: ' + reason}")
    passed = {kernel: run["kernels"][kernel] for kernel, why in reasons.items() if why is None}
    if passed:
        text = json.dumps(record | passed, indent=2, sort_keys=True) + "\n"
        replace_file(promotion.RECORD, text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
