"""The command line: what it writes, its exit codes, and its errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.cli import main

TASK = """
import torch
import sorted_kernels as sk
from sorted_kernels.cli.tasks import Task
from sorted_kernels.data import Batches

def make(**changes):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    sk.elasticize(model, {"0": {"out": "width"}, "2": {"in": "width"}})
    x = torch.randn(24, 4)
    t = x[:, :3].argmax(-1)
    parts = dict(
        model=model,
        space=sk.SubmodelSpace(width=[2, 4, 8]),
        train_loader=Batches(x, t, 8),
        test_loader=Batches(x, t, 8, shuffle=False),
        example=x[:1],
    )
    return Task(**{**parts, **changes})

def regression():
    x = torch.randn(24, 4)
    data = Batches(x, x[:, :3], 8)
    error = lambda outputs, targets: ((outputs - targets).square().sum(), len(targets))
    return make(train_loader=data, test_loader=data, loss=torch.nn.MSELoss(), metric=error)

def nothing():
    return None

def raises():
    return 1 / 0

def wrong_dimension():
    return make(space=sk.SubmodelSpace(height=[1]))

def wrong_example():
    return make(example=torch.randn(2, 5))

def no_example():
    return make(example=None)

def empty_example():
    return make(example=torch.randn(0, 4))

def endless():
    return make(train_loader=iter([]))
"""


def run(*arguments):
    """Run a command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "task.py"
    path.write_text(TASK)
    return path


@pytest.fixture
def trained(task, tmp_path):
    out = tmp_path / "run"
    assert run("train", "--out", out, "--task", f"{task}:make", "--epochs", 4, "--quiet") == 0
    return out


@pytest.mark.slow
def test_demo_quick(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # paths may be relative, and are by default
    assert run("demo", "--quick", "--quiet") == 0
    printed = capsys.readouterr().out
    assert "96 sub-models" in printed and ": the same" in printed
    out = tmp_path / "runs" / "demo-quick"
    for name in ("heat_map.png", "cost.png", "results.csv", "results.json", "selected.pt2"):
        assert (out / name).stat().st_size > 0
        assert name == "results.json" or f"runs/demo-quick/{name}" in printed
    assert json.loads((out / "config.json").read_text())["epochs"] == 3
    assert len((out / "results.csv").read_text().splitlines()) == 97
    summary = json.loads((out / "summary.json").read_text())
    assert summary["export_difference"] <= 1e-5
    assert summary["worst_half"] <= summary["largest"] <= summary["best"]
    assert summary["chosen_accuracy"] >= 0.99 * summary["best"]

    check = [sys.executable, str(out / "check_selected.py")]
    assert subprocess.run(check, cwd="/", capture_output=True, check=False).returncode == 0
    case = torch.load(out / "selected_case.pt")
    case["outputs"][3, 2] += 1e-4
    torch.save(case, out / "selected_case.pt")
    assert subprocess.run(check, cwd="/", capture_output=True, check=False).returncode == 1


def test_train_evaluate_select_export(trained, tmp_path, capsys):
    assert run("evaluate", trained, "--latency", "--quiet") == 0
    printed = capsys.readouterr().out
    assert "latency" in printed and "heat_map.png" in printed
    assert run("select", trained, "--max-latency-ms", 1e6) == 0
    assert "--submodel width=" in capsys.readouterr().out

    program = tmp_path / "small.pt2"
    assert run("export", trained, "--submodel", "width=4", "--out", program) == 0
    outputs = torch.export.load(program).module()(torch.randn(7, 4))
    assert outputs.shape == (7, 3)
    weights = tmp_path / "small.safetensors"
    assert run("export", trained, "--submodel", "width=4", "--out", weights) == 0
    from safetensors.torch import load_file

    assert load_file(weights)["0.weight"].shape == (4, 4)


def test_a_task_brings_its_loss_and_metric(task, tmp_path):
    out = tmp_path / "run"
    arguments = ("train", "--out", out, "--task", f"{task}:regression", "--steps", 2, "--quiet")
    for objective in ("stochastic", "stochastic-summation", "summation"):
        assert run(*arguments, "--objective", objective) == 0
        assert run("evaluate", out, "--quiet") == 0
        assert json.loads((out / "results.json").read_text())["metric"] == "<lambda>"
        out = tmp_path / objective
        arguments = (*arguments[:2], out, *arguments[3:])


def test_train_again_goes_on_from_the_end(trained, task):
    before = (trained / "history.json").read_text()
    arguments = ("train", "--out", trained, "--task", f"{task}:make", "--epochs", 4, "--quiet")
    assert run(*arguments) == 0
    assert run(*arguments, "--resume") == 0
    assert run(*arguments, "--no-resume") == 2
    assert (trained / "history.json").read_text() == before


def test_interrupted_training_goes_on(tmp_path):
    digits = ["train", "--epochs", "20", "--width", "16", "--hidden", "16", "--quiet", "--out"]
    program = [sys.executable, "-m", "sorted_kernels.cli", *digits]

    environment = {**_environment(), "OMP_NUM_THREADS": "1"}

    def train(out):
        subprocess.run([*program, str(out)], check=True, env=environment, capture_output=True)

    train(tmp_path / "whole")
    cut = tmp_path / "cut"
    command = [*program, str(cut)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while not list(cut.glob("checkpoints/step-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == "error: interrupted"
    train(cut)
    assert (cut / "history.json").read_text() == (tmp_path / "whole" / "history.json").read_text()


def test_held_out_digits_are_training_digits():
    from sorted_kernels.cli.recipe import Recipe
    from sorted_kernels.cli.tasks import load_task

    def rows(loader):
        return {tuple(row.tolist()) for row in loader.inputs}

    plain, held = (load_task(Recipe(width=16, hidden=16, holdout=h)) for h in (False, True))
    train, judge = rows(held.train_loader), rows(held.test_loader)
    assert train | judge == rows(plain.train_loader)
    assert not train & judge and not judge & rows(plain.test_loader)


def test_doctor(capsys):
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    for word in ("torch", "triton", "linear", "AdamW", "Experimental"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--out", "{tmp}/r", "--objective", "magic"), "'magic'.*stochastic"),
        (("train", "--out", "{tmp}/r", "--epochs", "0"), "--epochs is 0.*at least 1"),
        (("train", "--out", "{tmp}/r", "--epochs", "many"), "--epochs"),
        (("train", "--out", "{tmp}/r", "--width", "7"), "--width is 7.*at least 8"),
        (("train", "--out", "{tmp}/r", "--lr", "nan"), "--lr is nan.*above 0"),
        (("train", "--out", "{tmp}/r", "--weight-decay", "-1"), "--weight-decay is -1.0"),
        (("train", "--out", "{tmp}/r", "--warmup", "1"), "--warmup is 1.0.*below 1"),
        (("train", "--out", "{tmp}/r", "--seed", "-1"), "--seed is -1"),
        (("train", "--out", "{tmp}/r", "--device", "tpu"), "'tpu'.*auto, cpu, cuda"),
        (("train", "--out", "{tmp}/task.py/r", "--steps", "1"), "task.py/r.*cannot be written"),
        (("train", "--out", "{run}", "--lr", "1", "--task", "{tmp}/task.py:make"), "--lr 0.004 th"),
        (("train",), "--out"),
        (("nonsense",), "nonsense"),
        (("evaluate", "{tmp}"), "no run"),
        (("select", "{tmp}", "--max-flops", "5"), "has no results.json.*evaluate"),
        (("export", "{run}", "--submodel", "width=9", "--out", "{tmp}/x.pt2"), "width=9.*1..8"),
        (("export", "{run}", "--submodel", "width=0", "--out", "{tmp}/x.pt2"), "width.*0"),
        (("export", "{run}", "--submodel", "depth=1", "--out", "{tmp}/x.pt2"), "'depth'"),
        (("export", "{run}", "--submodel", "width", "--out", "{tmp}/x.pt2"), "width=4"),
        (("export", "{run}", "--submodel", "width=4", "--out", "{tmp}/x.onnx"), "pt2"),
        (("export", "{run}", "--submodel", "width=4", "--out", "{tmp}/task.py/x.pt2"), "written"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_wrong_input(arguments, message, trained, tmp_path, capsys):
    _assert_refused(arguments, message, trained, tmp_path, capsys)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "'nowhere'.*'digits'"),
        ("{tmp}/absent.py:make", "absent.py:make.*'digits'"),
        ("{tmp}/task.py:absent", "'absent'"),
        ("{tmp}/task.py:nothing", "NoneType.*Task"),
        ("{tmp}/task.py:raises", "ZeroDivisionError"),
        ("{tmp}/task.py:wrong_dimension", "fails at height=1.*'height'"),
        ("{tmp}/task.py:wrong_example", "fails at width=2"),
        ("{tmp}/task.py:no_example", "example is a NoneType"),
        ("{tmp}/task.py:empty_example", r"example has shape \(0, 4\)"),
        ("{tmp}/task.py:endless", "train_loader has no length"),
        ("{tmp}/broken.py:make", "broken.py.*cannot be loaded.*SyntaxError"),
        ("{tmp}/run/config.json:make", "not a Python file"),
    ],
)
def test_wrong_task(spec, message, trained, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def make(:")
    arguments = ("train", "--out", "{tmp}/r", "--task", spec)
    _assert_refused(arguments, message, trained, tmp_path, capsys)


def _assert_refused(arguments, message, trained, tmp_path, capsys):
    """Exit code 2, one line that says what is wrong, and nothing written."""
    before = sorted(tmp_path.rglob("*"))
    filled = [argument.format(tmp=tmp_path, run=trained) for argument in arguments]
    capsys.readouterr()
    assert run(*filled) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert "Traceback" not in error
    left = [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts]
    assert left == before


def test_options_of_the_digits_are_refused_for_a_file(task, tmp_path, capsys):
    arguments = ("--out", tmp_path / "r", "--task", f"{task}:make", "--hidden", 64)
    assert run("train", *arguments) == 2
    assert "--hidden is an option of the task 'digits'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"task": "digits"}', "\xff"],
    ids=["empty", "list", "bare", "one", "bytes"],
)
def test_damaged_configuration(content, trained, capsys):
    (trained / "config.json").write_bytes(content.encode("latin-1"))
    assert run("evaluate", trained) == 2
    assert re.search("config.json' is no run's configuration", capsys.readouterr().err)


def test_a_run_without_checkpoint(trained, capsys):
    for path in (trained / "checkpoints").iterdir():
        path.rename(trained / path.name)
    assert run("evaluate", trained) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(tmp_path):
    from sorted_kernels import CheckpointError

    with pytest.raises(CheckpointError, match="no run"):
        main(["evaluate", str(tmp_path), "--debug"])


def test_bare_command_shows_help(capsys):
    assert run() == 2
    shown = capsys.readouterr()
    assert "Exit codes" in shown.out and "error" not in shown.err


def test_help_has_examples(capsys):
    for command in ("demo", "doctor", "train", "evaluate", "select", "export"):
        assert run(command, "--help") == 0
        assert f"sorted-kernels {command}" in capsys.readouterr().out


def test_without_the_extra_it_says_which(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('no', name='typer')")
    done = subprocess.run(
        [sys.executable, "-m", "sorted_kernels.cli", "doctor"],
        env=_environment(str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: typer") and "sorted_kernels[cli]" in done.stderr


def _environment(*first):
    """Ours, with this process's import path after some folders."""
    return {**os.environ, "PYTHONPATH": ":".join([*first, *filter(None, sys.path)])}


def test_sizes_by_block_on_the_command_line():
    from sorted_kernels.cli.app import parse_submodel

    assert parse_submodel("depth=2, ffn=(5, 9),w=3") == sk.Submodel(depth=2, ffn=(5, 9), w=3)
    for text in ("ffn=(5,9", "ffn=5,9", "ffn=()", "depth=2,depth=3"):
        with pytest.raises(sk.OptionError, match="--submodel is"):
            parse_submodel(text)
