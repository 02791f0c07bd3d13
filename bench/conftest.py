"""pytest-benchmark's side: one test a case and contestant, which also writes our CSV row.

``pytest bench --benchmark-only`` times each contestant on its own; ratios are better read from
``python -m bench``, which interleaves them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import machine
from bench.harness import Case, Timer, make_row
from bench.rows import append_rows


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--bench-csv", default="runs/bench/pytest.csv", help="CSV file to append to")
    group.addoption("--bench-device", default=machine.best_device().type)
    group.addoption("--bench-quick", action="store_true", help="a few small cases")


def pytest_generate_tests(metafunc):
    """Parametrize a benchmark over its module's cases and their contestants."""
    if "case" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    device = torch.device(option("--bench-device"))
    cases = metafunc.module.cases(device, option("--bench-quick"))
    pairs = [(case, provider) for case in cases for provider in case.contestants]
    ids = [f"{case} {provider}".replace(" ", "-") for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=ids)


@pytest.fixture
def measure(benchmark, request):
    """Time one contestant with pytest-benchmark and append its row to the CSV file."""

    def run(case: Case, provider: str) -> None:
        contestant = case.contestants[provider]()
        contestant.call()
        gpu = case.device.type == "cuda"

        def call() -> None:
            contestant.call()
            if gpu:
                torch.cuda.synchronize()

        benchmark.group = str(case)
        repeats = Timer(case).repeats_for(contestant.call)
        benchmark.pedantic(call, rounds=15, iterations=repeats, warmup_rounds=2)
        if benchmark.stats is not None:  # None under --benchmark-disable
            row = make_row(case, provider, benchmark.stats.stats.data)
            append_rows(Path(request.config.getoption("--bench-csv")), [row])

    return run
