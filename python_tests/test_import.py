"""What ``import sorted_kernels`` does, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = [
    "triton", "matplotlib", "rich", "typer", "sklearn", "safetensors", "transformers", "pandas",
    "sorted_kernels.triton", "sorted_kernels._host", "torch._dynamo", "torch._inductor",
]  # fmt: skip
PROGRAM = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import sorted_kernels as sk
seconds = time.perf_counter() - start
y = sk.linear(torch.randn(2, 3), torch.randn(4, 3), out_features=2)
new = sorted(set(sys.modules) - before)
print(json.dumps({
    "new": new, "cuda": torch.cuda.is_initialized(), "shape": list(y.shape), "seconds": seconds,
    "missing": [name for name in sk.__all__ if not hasattr(sk, name)],
    "ops": hasattr(torch.ops.sorted_kernels, "staircase_adamw_"),
}))
"""


def run(**variables):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
    )
    assert done.stderr == "", "importing is silent"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report():
    return run()


def test_cuda_is_not_touched(report):
    assert report["cuda"] is False


def test_optional_packages_are_not_imported(report):
    found = [name for name in report["new"] if name.split(".")[0] in HEAVY or name in HEAVY]
    assert found == []


def test_public_names_are_there(report):
    assert report["missing"] == [] and report["ops"] and report["shape"] == [2, 2]


def test_without_the_compiled_library():
    assert run(SORTED_KERNELS_NO_LIBRARY="1")["shape"] == [2, 2]


def test_importing_is_quick(report):
    """Far below the two seconds allowed: what takes long is imported where it is used."""
    assert len(report["new"]) < 120
