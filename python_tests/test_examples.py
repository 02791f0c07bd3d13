"""The examples run, and Table 9 shows what the paper shows."""

import runpy
from pathlib import Path

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
