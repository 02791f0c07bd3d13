"""The command line: what it writes, its exit codes, and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sorted_kernels.cli import main

TASK = """
import torch
import sorted_kernels as sk
from sorted_kernels.cli.tasks import Task
from sorted_kernels.data import Batches

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    sk.elasticize(model, {"0": {"out": "width"}, "2": {"in": "width"}})
    x = torch.randn(24, 4)
    t = x[:, :3].argmax(-1)
    space = sk.SubmodelSpace(width=[2, 4, 8])
    return Task(model, space, Batches(x, t, 8), Batches(x, t, 8, shuffle=False), x[:2])

def nothing():
    return None
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


def test_demo_quick(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("demo")  # relative, as the default is
    assert run("demo", "--out", out, "--quick", "--quiet") == 0
    printed = capsys.readouterr().out
    assert "96 sub-models" in printed and ": the same" in printed
    for name in ("heat_map.png", "cost.png", "results.csv", "results.json", "selected.pt2"):
        assert (out / name).stat().st_size > 0
    assert json.loads((out / "config.json").read_text())["epochs"] == 3
    assert len((out / "results.csv").read_text().splitlines()) == 97


def test_train_evaluate_select_export(trained, tmp_path, capsys):
    assert run("evaluate", trained, "--quiet") == 0
    assert run("select", trained, "--min-recovery", 50) == 0
    assert "width" in capsys.readouterr().out
    program = tmp_path / "small.pt2"
    assert run("export", trained, "--submodel", "width=4", "--out", program) == 0
    outputs = torch.export.load(program).module()(torch.randn(7, 4))
    assert outputs.shape == (7, 3)
    weights = tmp_path / "small.safetensors"
    assert run("export", trained, "--submodel", "width=4", "--out", weights) == 0
    from safetensors.torch import load_file

    assert load_file(weights)["0.weight"].shape == (4, 4)


def test_train_again_goes_on_from_the_end(trained, task, capsys):
    before = (trained / "history.json").read_text()
    arguments = ("--out", trained, "--task", f"{task}:make", "--epochs", 4, "--quiet")
    assert run("train", *arguments) == 0
    assert (trained / "history.json").read_text() == before


def test_doctor(capsys):
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    for word in ("torch", "triton", "linear", "AdamW", "Experimental"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--out", "{tmp}/r", "--objective", "magic"), "magic.*stochastic"),
        (("train", "--out", "{tmp}/r", "--task", "nowhere"), "'nowhere'.*digits"),
        (("train", "--out", "{tmp}/r", "--task", "{tmp}/task.py:absent"), "absent"),
        (("train", "--out", "{tmp}/r", "--task", "{tmp}/task.py:nothing"), "NoneType.*Task"),
        (("train", "--out", "{tmp}/r", "--epochs", "0"), "--epochs 0 must be at least 1"),
        (("train", "--out", "{tmp}/task.py/r"), "cannot be written"),
        (("train",), "out"),
        (("nonsense",), "nonsense"),
        (("evaluate", "{tmp}"), "no run"),
        (("select", "{tmp}", "--max-flops", "5"), "results.json"),
        (("export", "{run}", "--submodel", "width=9", "--out", "{tmp}/x.pt2"), "width=9.*1..8"),
        (("export", "{run}", "--submodel", "depth=1", "--out", "{tmp}/x.pt2"), "'depth'"),
        (("export", "{run}", "--submodel", "width", "--out", "{tmp}/x.pt2"), "width=4"),
        (("export", "{run}", "--submodel", "width=4", "--out", "{tmp}/x.onnx"), "pt2"),
        (("export", "{run}", "--submodel", "width=4", "--out", "{tmp}/task.py/x.pt2"), "written"),
        (("train", "--out", "{run}", "--epochs", "9", "--task", "{tmp}/task.py:make"), "other"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_wrong_input(arguments, message, trained, tmp_path, capsys):
    before = sorted(path.name for path in tmp_path.iterdir())
    filled = [argument.format(tmp=tmp_path, run=trained) for argument in arguments]
    assert run(*filled) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    import re

    assert re.search(message, error), error
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in left if name not in before] in ([], ["r"])


def test_help_has_examples(capsys):
    for command in ("demo", "doctor", "train", "evaluate", "select", "export"):
        assert run(command, "--help") == 0
        assert f"sorted-kernels {command}" in capsys.readouterr().out


def test_without_the_extra_it_says_which(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('no', name='typer')")
    done = subprocess.run(
        [sys.executable, "-c", "from sorted_kernels.cli import main; main(['doctor'])"],
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(filter(None, sys.path))}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "sorted_kernels[cli]" in done.stderr
