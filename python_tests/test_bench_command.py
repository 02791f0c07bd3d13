"""The benchmarks' command lines: every case runs, and a broken one leaves the others alone."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import exercise_kernels, harness, limits
from bench.harness import Case, Contestant, check_agreement
from bench.rows import read_rows
from sorted_kernels.ops import backend
from support import emulated_gemm
from support.bench_rows import ROW

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
LIMITS = [
    replace(ROW, kernel="limit", provider="torch", mode=mode, metric=metric)
    for mode, metric in (("copy", "GB/s"), ("matmul", "TFLOP/s"))
]


def shell(*arguments, cwd=ROOT):
    """A Python of its own."""
    outer = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    env = {**outer, "PYTHONPATH": str(ROOT), "BENCH_COMMIT": "0123456789ab"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tiny(name, error=None, outcome=1.0):
    """A case that takes no time, and whose ``ours`` may fail or compute something else."""

    def call():
        if error:
            raise error

    contestants = {
        "B0": lambda: Contestant(lambda: None, lambda: [torch.ones(1)]),
        "ours": lambda: Contestant(call, lambda: [torch.tensor([outcome])]),
    }
    return Case(name, "mode", "n=1", torch.float32, contestants, CPU)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """``run(families, *arguments)``: the exit code, and the rows of the kernels it wrote."""
    monkeypatch.setattr(limits, "measure", lambda device, quick: LIMITS)
    monkeypatch.setattr(harness, "interleave", lambda case, each, s: dict.fromkeys(each, [1e-3]))

    def run(families, *arguments):
        made = {name: lambda *_, cases=cases: cases for name, cases in families.items()}
        monkeypatch.setattr(command, "FAMILIES", made)
        options = command.parse(["--out", str(tmp_path), "--device", "cpu", *arguments])
        code = command.run(options)
        rows = read_rows([tmp_path / "benchmarks.csv"])
        assert rows[:2] == LIMITS
        return code, [(row.kernel, row.provider) for row in rows[2:]]

    return run


def both(*names):
    return [(name, provider) for name in names for provider in ("B0", "ours")]


def test_all_cases_are_run_and_written(run, capsys):
    families = {"one": [tiny("a"), tiny("b")], "two": [tiny("c")]}
    assert run(families) == (0, both("a", "b", "c"))
    out = capsys.readouterr().out
    assert "\n3 cases, " in out and "FAILED" not in out and "LEFT OUT" not in out
    assert "limits: copy 0 GB/s, matmul 0.5 TFLOP/s" in out and "ours/B0 1.00" in out


def test_only_some_families(run):
    assert run({"one": [tiny("a")], "two": [tiny("b")]}, "--only", "two") == (0, both("b"))


@pytest.mark.parametrize(
    "broken",
    [tiny("b", outcome=2.0), tiny("b", RuntimeError("no memory")), tiny("b", LookupError("odd"))],
    ids=["disagreement", "runtime", "of-a-compiler"],
)
def test_a_case_that_fails_has_no_row_and_leaves_the_others_alone(run, capsys, broken):
    assert run({"one": [tiny("a"), broken, tiny("c")]}) == (1, both("a", "c"))
    out = capsys.readouterr().out
    assert "b mode n=1 float32 hot\n    FAILED: " in out
    assert out.endswith("FAILED: b mode n=1 float32 hot\n")


@pytest.mark.parametrize("seconds", ["0", "-5", "1e-9"])
def test_cases_that_there_is_no_time_for_are_named(run, capsys, seconds):
    assert run({"one": [tiny("a"), tiny("b")]}, "--seconds", seconds) == (1, [])
    assert capsys.readouterr().out.endswith(
        "LEFT OUT for lack of time: a mode n=1 float32 hot\n"
        "LEFT OUT for lack of time: b mode n=1 float32 hot\n"
    )


def test_enough_time_leaves_nothing_out(run):
    assert run({"one": [tiny("a")]}, "--seconds", "1000")[0] == 0


def test_threads_are_those_asked_for(run):
    before = torch.get_num_threads()
    try:
        run({"one": []}, "--threads", "3")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--out", "x", "--device", "tpu"], ["--out", "x", "--only", "nothing"]],
    ids=["no-folder", "device", "family"],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        command.parse(arguments)
    assert error.value.code == 2 and "usage: python -m bench" in capsys.readouterr().err


@pytest.mark.parametrize("family", list(command.FAMILIES))
def test_contestants_agree_on_the_quick_cases(family):
    """On something: a result that is all zeros would agree with another that was never computed."""
    cases = command.FAMILIES[family](CPU, True)
    assert cases and len({str(case) for case in cases}) == len(cases)
    for case in cases:
        contestants = {name: build() for name, build in case.contestants.items()}
        assert "ours" in contestants
        check_agreement(case, contestants)
        for name, contestant in contestants.items():
            more = name == "full"  # all rows at full size: another, larger problem
            assert contestant.outcome or more or family == "host", (str(case), name)
            assert all(tensor.any() for tensor in (contestant.outcome or list)()), (str(case), name)


def test_help(capsys):
    with pytest.raises(SystemExit) as error:
        command.parse(["--help"])
    assert (
        error.value.code == 0 and "usage: python -m bench [-h] --out OUT" in capsys.readouterr().out
    )


def test_a_quick_run_from_the_shell(tmp_path):
    shell("-m", "bench", "--out", str(tmp_path), "--device", "cpu", "--quick", "--only", "host")
    rows = read_rows([tmp_path / "benchmarks.csv"])
    assert [(row.kernel, row.mode, row.provider) for row in rows] == [
        ("limit", "copy", "torch"),
        ("limit", "matmul", "torch"),
        *(("host", "forward+backward", provider) for provider in ("B2", "B1", "B0", "ours")),
        ("host", "switch", "ours"),
    ]
    assert all(row.p50 > 0 and row.commit == "0123456789ab" for row in rows)


def test_pytest_benchmark_writes_rows_too(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    path = tmp_path / "rows.csv"
    options = ["-p", "no:cacheprovider", "--bench-quick", "--bench-device=cpu"]
    shell("-m", "pytest", str(ROOT / "bench"), "-kswitch", f"--bench-csv={path}", *options)
    (row,) = read_rows([path])
    assert (row.kernel, row.mode, row.provider, row.metric) == ("host", "switch", "ours", "us")
    assert row.samples == 15 and 0 < row.p20 <= row.p80


@pytest.fixture
def exercise(monkeypatch, capsys):
    """The exit code of the kernels' exercise on the CPU, and the lines it printed."""
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # put back as it was afterwards
    cases = len(exercise_kernels.LAYERS) * len(exercise_kernels.OPTIMIZERS) * 2 + 4  # attention
    linear = 2 * len(exercise_kernels.BATCHES)

    def run(back_ends=()):
        monkeypatch.setattr(exercise_kernels, "back_ends", lambda device: list(back_ends))
        code = exercise_kernels.main(["--device", "cpu"])
        return code, capsys.readouterr().out.splitlines()[-cases - linear * len(back_ends) :]

    return run


def test_kernels_exercised_are_right(exercise):
    code, lines = exercise(["reference"])
    linear = [line for line in lines if line.startswith("linear by reference, ")]
    assert len(linear) == 2 * len(exercise_kernels.BATCHES)
    others = 4 * len(exercise_kernels.LAYERS) + 4  # attention
    assert code == 0 and len(set(lines)) == others + len(linear)
    assert all(": right (off by " in line for line in lines)


def test_a_product_that_ran_elsewhere_fails_the_exercise(exercise):
    """The sanitizer would have seen nothing of the kernel."""
    code, lines = exercise(["cuda"])
    failed = [line for line in lines if "FAILED: RuntimeError: products ran in reference" in line]
    assert code == 1 and len(failed) == 8 and all("linear by cuda" in line for line in failed)


def test_triton_is_exercised_by_force():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert exercise_kernels.back_ends(CPU) == ["triton", "reference"]  # interpreted
    difference = exercise_kernels.exercise_linear("triton", "ragged", False, CPU)
    assert difference < exercise_kernels.TOLERANCES[torch.bfloat16]
    assert "SORTED_KERNELS_BACKEND" not in os.environ or not os.environ["SORTED_KERNELS_BACKEND"]


def test_the_compiled_gemm_is_exercised_through_the_public_op(monkeypatch):
    """Emulated here; the exercise itself chooses sizes that the kernel takes."""
    pytest.importorskip("sorted_kernels._host", reason="there is no emulation")
    emulated_gemm.install(monkeypatch)
    calls = emulated_gemm.dispatched("cpu", monkeypatch, forced="cuda")
    monkeypatch.setattr(exercise_kernels, "forced", lambda setting: contextlib.nullcontext())
    try:
        for batch in exercise_kernels.BATCHES:
            calls.clear()
            difference = exercise_kernels.exercise_linear("cuda", batch, True, torch.device("cpu"))
            assert difference < exercise_kernels.TOLERANCES[torch.bfloat16]
            assert {mode for mode, *_ in calls} == {"forward", "dgrad", "wgrad"} and len(calls) == 6
    finally:
        monkeypatch.undo()
        backend.reset()


def test_a_wrong_result_fails_the_exercise(exercise, monkeypatch):
    train = exercise_kernels.train

    def train_wrongly(layer, *arguments):
        results = train(layer, *arguments)
        wrong = isinstance(layer, torch.nn.Embedding) and layer.weight.dtype == torch.float32
        return [results[0] * 1.01, *results[1:]] if wrong else results

    monkeypatch.setattr(exercise_kernels, "train", train_wrongly)
    code, lines = exercise()
    wrong = [line for line in lines if ": WRONG (off by 1.0e-02)" in line]
    assert code == 1 and len(wrong) == 2 and all("embedding" in line for line in wrong)


def test_an_error_in_one_exercise_leaves_the_others_alone(exercise, monkeypatch):
    def broken():
        raise LookupError("odd")

    monkeypatch.setitem(exercise_kernels.LAYERS, "rms_norm", broken)
    code, lines = exercise()
    failed = [line for line in lines if line.endswith(": FAILED: LookupError: odd")]
    assert code == 1 and len(failed) == 4 and all(line.startswith("rms_norm") for line in failed)
    assert sum(": right" in line for line in lines) == len(lines) - 4
