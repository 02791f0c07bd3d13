"""Write ``environment.json``: the machine, the versions, each stage's end, which tests passed.

``python -m bench.environment OUT --stages FILE.tsv [--junit FILE.xml]``

The digests are those of the sources of the kernels that the run used, so that a kernel can be told
to have passed a GPU run for exactly this source.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.rows import replace_file
from sorted_kernels.ops import backend, optimizer, promotion

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "pybind11", "cmake", "ninja")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_gpu() -> dict[str, Any] | None:
    """Name, capability, memory and driver of the current GPU, or None."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory >> 20,
        "l2_mib": properties.L2_cache_size >> 20,
        "driver": (machine.output_of(*query) or "unknown").splitlines()[0],
    }


def read_junit(path: Path) -> dict[str, Any]:
    """Tests by outcome, a file at a time, with the names of those that did not pass."""
    files: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = case.get("classname", "")
        counts = files.setdefault(name, {"passed": 0, "failed": [], "skipped": []})
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"].append(case.get("name"))
        elif (skip := case.find("skipped")) is not None:
            counts["skipped"].append(f"{case.get('name')}: {skip.get('message')}")
        else:
            counts["passed"] += 1
    return files


def read_stages(path: Path) -> list[dict[str, Any]]:
    """Stages in order: name, outcome (``passed``, ``failed N``, ``left out: why``), seconds."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return [
        {"stage": name, "outcome": outcome, "seconds": int(seconds)}
        for name, outcome, seconds in lines
    ]


def runs_compiled_gemm() -> bool:
    """Whether the compiled GEMM, which its tests call by name, runs here."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return hopper and backend.has_cuda_gemm()


def digests() -> dict[str, str | None]:
    """Digest of each kernel's sources; None for one in whose place plain PyTorch runs on a GPU."""
    used = {op: backend.choose(op, "cuda").backend == "triton" for op in backend.OPS}
    used["staircase_optimizer"] = optimizer.use_native("cuda")
    used["cuda_linear"] = runs_compiled_gemm()
    return {kernel: promotion.digest(kernel) if used[kernel] else None for kernel in used}


def describe(stages: Path | None, junit: Path | None) -> dict[str, Any]:
    """Everything, as it goes into the file."""
    nvcc = machine.output_of("nvcc", "--version")
    return {
        "date": machine.today(),
        "commit": machine.commit(),
        "gpu": describe_gpu(),
        "cpu": machine.device_name("cpu"),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda_of_torch": torch.version.cuda,
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "packages": {package: _version(package) for package in PACKAGES},
        "stages": read_stages(stages) if stages else [],
        "tests": read_junit(junit) if junit and junit.exists() else {},
        "kernels": digests(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.environment", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", type=Path)
    parser.add_argument("--junit", type=Path)
    options = parser.parse_args(arguments)
    text = json.dumps(describe(options.stages, options.junit), indent=2)
    replace_file(options.out / "environment.json", text + "\n")


if __name__ == "__main__":
    main()
