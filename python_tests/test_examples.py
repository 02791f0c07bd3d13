"""The examples run, and Table 9 shows what the paper shows."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_table_9(one_thread):
    table = runpy.run_path(str(EXAMPLES / "table9.py"))["measure"]()

    def mean(order, name):
        return table[order, name][:, 1:].mean().item()

    assert mean("target", "sorted") >= 85
    assert mean("target", "sorted") >= mean("target", "plain") + 10
    assert table["target", "sorted"][:, 5].mean() >= 92  # the first five neurons
    assert mean("reverse", "sorted") <= mean("reverse", "plain") - 15


def test_masked_neurons_are_the_sub_model(one_thread):
    table9 = runpy.run_path(str(EXAMPLES / "table9.py"))
    inputs, targets = table9["blobs"]()
    model = table9["train"](sk.SubmodelSpace(width=range(1, 11)), inputs, targets, "relu", 0)
    for k in (1, 4, 9):
        masked = table9["accuracy"](model, slice(0, k), inputs, targets)
        with sk.active(model, sk.Submodel(width=k)):
            right = (model(inputs).argmax(-1) == targets).float().mean().item()
        assert masked == pytest.approx(100 * right)


def test_quickstart(one_thread, capsys):
    quickstart = runpy.run_path(str(EXAMPLES / "quickstart.py"))
    quickstart["operations"]()
    small = quickstart["training"](epochs=1)
    assert type(small.stem) is torch.nn.Linear
    assert capsys.readouterr().out.count("depth ") == 12


def test_own_task(one_thread, tmp_path, capsys):
    spec = f"{EXAMPLES / 'own_task.py'}:wine"
    for arguments in (
        ("train", "--task", spec, "--out", tmp_path, "--epochs", 40, "--quiet"),
        ("evaluate", tmp_path, "--quiet"),
        ("select", tmp_path, "--min-metric", 0.9),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert exit_.value.code == 0


def test_gradient_accumulation(one_thread, capsys):
    pytest.importorskip("sklearn")
    example = runpy.run_path(str(EXAMPLES / "gradient_accumulation.py"))
    found = example["main"](["--epochs", "1", "--seeds", "1", "--accumulate", "1", "4"])
    assert found["5"][1] == found["6"][1]  # the same run
    assert found["5"][4] != found["6"][4]
    assert all(len(row) == 4 for table in found.values() for row in table.values())
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split()[:3] for line in printed if line.strip()[:1] in "1234" and line.strip()]
    assert rows == [
        ["1", "21", "1"], ["4", "21", "4"], ["1", "21", "1"], ["4", "5", "1"],
    ]  # fmt: skip


@pytest.fixture
def small_grid(one_thread, monkeypatch):
    """The grid's example with four sub-models."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    grid = importlib.import_module("mobilenet_grid")
    monkeypatch.setattr(grid, "DEPTHS", (4, 16))
    monkeypatch.setattr(grid, "WIDTHS", (3, 10))
    yield grid
    sys.modules.pop("mobilenet_grid", None)
    sys.modules.pop("adjust_classifier", None)


def test_mobilenet_grid(small_grid, tmp_path, capsys):
    space = small_grid.main(["--epochs", "1", "--out", str(tmp_path)])
    assert 1 <= len(space) <= 4
    everything = sk.inference.Results.from_csv(tmp_path / "all.csv")
    selected = sk.inference.Results.from_csv(tmp_path / "selected.csv")
    assert len(everything) == 4
    kept = {row.submodel for row in everything if everything.recovery(row) >= 97}
    assert {row.submodel for row in selected} == kept
    for name in ("all.png", "selected.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_adjust_classifier(small_grid, tmp_path, capsys):
    adjust = importlib.import_module("adjust_classifier")
    before, after = adjust.main(["--epochs", "1", "--out", str(tmp_path)])
    assert len(before) == len(after) == 4
    assert any(a.metric != b.metric for a, b in zip(before, after, strict=True))
    assert "mean gain" in capsys.readouterr().out


def test_the_grid_is_the_papers():
    pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
    grid = runpy.run_path(str(EXAMPLES / "mobilenet_grid.py"))
    paper = grid["PRESETS"]["cifar10"]
    assert len(grid["DEPTHS"]) * len(grid["WIDTHS"]) == 160
    assert (paper.epochs, paper.batch_size, paper.seed) == (60 * 160, 128, 4242)
