"""The examples run, and Table 9 shows what the paper shows."""

import runpy
from pathlib import Path

import pytest
import torch

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


def test_quickstart(one_thread, capsys):
    quickstart = runpy.run_path(str(EXAMPLES / "quickstart.py"))
    quickstart["operations"]()
    small = quickstart["training"](epochs=1)
    assert type(small.stem) is torch.nn.Linear
    assert capsys.readouterr().out.count("depth ") == 12
