from __future__ import annotations

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sorted_kernels import Submodel, SubmodelSpace
from sorted_kernels.data import Batches
from sorted_kernels.errors import CheckpointError, DimensionError, OptionError
from sorted_kernels.nn import activate, current
from sorted_kernels.optim import AdamW
from sorted_kernels.training import Stochastic, cosine, fit, latest_checkpoint, save_checkpoint
from support.training import (
    Net,
    assert_same_weights,
    leaves,
    random_data,
    sliced_logits,
    weights_of,
)

SPACE = SubmodelSpace(width=[3, 8, 16], depth=[1, 2, 3])


def pieces(rows=40, batch_size=8, dropout=0.0, lr=0.1, dtype=torch.float32):
    model = Net(dropout).to(dtype)
    loader = Batches(*random_data(rows, dtype=dtype), batch_size, seed=1)
    return model, Stochastic(SPACE, seed=2), loader, torch.optim.SGD(model.parameters(), lr=lr)


class Recorder:
    """An objective that trains nothing and notes the batches and scales it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, model, batch, scale):
        self.seen.append((int(batch[0]), scale))
        return torch.tensor(float(batch[0]))


def numbered(count):
    return [torch.full((2,), float(i)) for i in range(count)]


def recorded(count, **options):
    recorder = Recorder()
    history = fit(Net(), recorder, numbered(count), pieces()[3], progress=False, **options)
    return [index for index, _ in recorder.seen], history


def test_one_step_is_the_mean_over_its_micro_batches():
    model, objective, loader, optimizer = pieces(rows=24, lr=0.7, dtype=torch.float64)
    twin = pieces(rows=24, dtype=torch.float64)
    params = leaves(model)
    losses = []
    for inputs, targets in twin[2]:
        submodel = twin[1].choose()[0]
        losses.append(F.cross_entropy(sliced_logits(params, submodel, inputs), targets))
    (sum(losses) / 3).backward()
    history = fit(model, objective, loader, optimizer, steps=1, accumulate=3, progress=False)
    for name, param in model.named_parameters():
        gradient = params[name].grad  # None for blocks deeper than any draw
        expected = params[name].detach() - (0 if gradient is None else 0.7 * gradient)
        torch.testing.assert_close(param.detach(), expected, msg=name)
    assert history.losses == pytest.approx([sum(losses).item() / 3])


def test_a_window_that_an_epoch_cuts_goes_on_in_the_next():
    seen, history = recorded(5, epochs=2, accumulate=2)
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert history.losses == [0.5, 2.5, 2.0, 1.5, 3.5]


def test_micro_batches_that_fill_no_window_are_not_run():
    seen, history = recorded(5, epochs=1, accumulate=2)
    assert seen == [0, 1, 2, 3]
    assert len(history.losses) == 2


def test_whichever_of_epochs_and_steps_ends_first():
    assert recorded(5, epochs=3, steps=4)[0] == [0, 1, 2, 3]
    assert recorded(5, epochs=1, steps=40)[0] == [0, 1, 2, 3, 4]
    assert recorded(2, steps=5)[0] == [0, 1, 0, 1, 0]


def test_scale_is_one_over_the_micro_batches():
    recorder = Recorder()
    fit(Net(), recorder, numbered(4), pieces()[3], steps=1, accumulate=4, progress=False)
    assert [scale for _, scale in recorder.seen] == [0.25] * 4


def test_it_learns():
    inputs, _ = random_data(200)
    targets = inputs[:, :4].argmax(dim=1)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = Batches(inputs, targets, 20)
    history = fit(model, Stochastic(SPACE), loader, optimizer, epochs=30, progress=False)
    assert sum(history.losses[-20:]) < 0.5 * sum(history.losses[:20])
    assert (model(inputs).argmax(dim=1) == targets).float().mean() > 0.9


def test_schedule_moves_once_an_optimizer_step():
    model, objective, loader, optimizer = pieces(lr=1.0)
    rates = []
    fit(
        model,
        objective,
        loader,
        optimizer,
        steps=4,
        accumulate=2,
        scheduler=cosine(optimizer, 4),
        evaluate=lambda model, step: rates.append(optimizer.param_groups[0]["lr"]) or {},
        evaluate_every=1,
        progress=False,
    )
    assert rates == pytest.approx([0.8535533, 0.5, 0.1464466, 0.0], abs=1e-6)


def test_gradient_norm_is_clipped():
    model, objective, loader, optimizer = pieces(lr=1.0)
    before = weights_of(model)
    fit(model, objective, loader, optimizer, steps=1, max_grad_norm=0.01, progress=False)
    moved = [(model.state_dict()[name] - before[name]).square().sum() for name in before]
    assert float(sum(moved).sqrt()) == pytest.approx(0.01, rel=1e-3)


def test_only_what_was_drawn_moves():
    model, _, loader, _ = pieces()
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = weights_of(model)
    only = Stochastic(SubmodelSpace.of([Submodel(width=3, depth=1)]))
    fit(model, only, loader, optimizer, steps=3, progress=False)
    after = weights_of(model)
    assert not torch.equal(after["stem.weight"][:3], before["stem.weight"][:3])
    assert torch.equal(after["stem.weight"][3:], before["stem.weight"][3:])
    assert torch.equal(after["head.weight"][:, 3:], before["head.weight"][:, 3:])
    assert torch.equal(after["blocks.1.weight"], before["blocks.1.weight"])


def test_evaluation_is_recorded_and_leaves_no_trace():
    active, seen = Submodel(width=5, depth=2), []

    def evaluate(model, step):
        seen.append((step, model.training, torch.is_grad_enabled()))
        activate(model, Submodel(width=1))
        torch.rand(3), np.random.rand(3)
        return {"accuracy": torch.tensor(0.5), "count": np.int64(3), "by_width": {"3": 0.25}}

    weights = []
    for callback in (None, evaluate):
        model, objective, loader, optimizer = pieces(dropout=0.3)
        activate(model, active)
        torch.manual_seed(5)
        every = 2 if callback else None
        history = fit(
            model,
            objective,
            loader,
            optimizer,
            steps=5,
            evaluate=callback,
            evaluate_every=every,
            progress=False,
        )
        assert current(model) == active
        assert model.training
        weights.append(weights_of(model))
    assert_same_weights(*weights)
    assert seen == [(2, False, False), (4, False, False), (5, False, False)]
    assert [record["step"] for record in history.records] == [2, 4, 5]
    assert [record["epoch"] for record in history.records] == [0, 0, 0]
    assert history.records[1]["train_loss"] == pytest.approx(sum(history.losses[2:4]) / 2)
    assert history.records[0]["accuracy"] == 0.5
    assert json.loads(json.dumps(history.records)) == history.records


def test_metrics_that_json_cannot_hold():
    model, objective, loader, optimizer = pieces()
    with pytest.raises(OptionError, match="evaluate returned"):
        fit(
            model,
            objective,
            loader,
            optimizer,
            steps=1,
            evaluate=lambda model, step: {"a": object()},
            progress=False,
        )


def train_with_interrupt(directory, at_step=None, signals=1):
    """Six steps of two micro-batches; Ctrl-C comes during the first micro-batch of a step."""
    model, objective, loader, optimizer = pieces(dropout=0.2, rows=24)
    calls = 0

    def interrupted(model, batch, scale):
        nonlocal calls
        calls += 1
        if at_step is not None and calls == 2 * at_step - 1:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
        return objective(model, batch, scale)

    interrupted.state_dict = objective.state_dict
    interrupted.load_state_dict = objective.load_state_dict
    torch.manual_seed(9)
    options = {"steps": 6, "accumulate": 2, "checkpoint_dir": directory, "progress": False}
    fit(model, interrupted, loader, optimizer, **options)
    return weights_of(model)


def test_interrupt_saves_the_finished_step_and_training_goes_on_from_it(tmp_path):
    straight = train_with_interrupt(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train_with_interrupt(tmp_path / "cut", at_step=3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert latest_checkpoint(tmp_path / "cut").name == "step-000003"
    assert_same_weights(train_with_interrupt(tmp_path / "cut"), straight)


def test_second_interrupt_does_not_wait_and_saves_no_half_step(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_with_interrupt(tmp_path, at_step=3, signals=2)
    assert latest_checkpoint(tmp_path) is None


def test_interrupt_in_evaluation_saves(tmp_path):
    model, objective, loader, optimizer = pieces()

    def evaluate(model, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            model,
            objective,
            loader,
            optimizer,
            steps=9,
            evaluate=evaluate,
            evaluate_every=4,
            checkpoint_dir=tmp_path,
            progress=False,
        )
    assert latest_checkpoint(tmp_path).name == "step-000004"


def test_an_interrupt_handler_of_the_user_is_kept():
    def own(signum, frame):
        raise AssertionError("not called")

    before = signal.signal(signal.SIGINT, own)
    try:
        fit(*pieces(), steps=1, progress=False)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_progress_silent_and_plain(capsys):
    fit(*pieces(), steps=3, progress=False)
    assert capsys.readouterr() == ("", "")
    fit(*pieces(), steps=3)
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    for part in ("step 3/3", "loss ", "lr 1.00e-01", "width=", "steps/s"):
        assert part in last


def test_progress_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    fit(*pieces(), steps=3)
    text = capsys.readouterr().err
    assert "3/3" in text
    assert "loss" in text


def test_batches_of_every_shape_reach_the_objective():
    seen = []

    def objective(model, batch, scale):
        seen.append(batch)
        return torch.zeros(())

    batch = {"x": torch.ones(2), "pair": (torch.zeros(1), "label"), "id": 3}
    fit(Net(), objective, [batch], pieces()[3], steps=1, progress=False, device="cpu")
    assert seen[0]["pair"][1] == "label"
    assert seen[0]["id"] == 3
    assert torch.equal(seen[0]["x"], torch.ones(2))


def never(*args):
    raise AssertionError("training began")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither epochs nor steps"),
        ({"epochs": 0}, "epochs is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"steps": 1, "accumulate": 0}, "accumulate is 0"),
        ({"epochs": 1, "accumulate": 6}, "5 batches, too few for accumulate=6"),
        ({"steps": 1, "max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"steps": 1, "evaluate_every": 2}, "evaluate_every=2 is given without evaluate"),
        ({"steps": 1, "checkpoint_every": 2}, "checkpoint_every=2 is given without"),
        ({"steps": 1, "checkpoint_dir": "never-made", "keep": 0}, "keep is 0"),
        ({"steps": 1, "resume": "yes"}, "resume is 'yes'"),
        ({"steps": 1, "resume": True}, "resume=True is given without checkpoint_dir"),
    ],
)
def test_bad_options(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _, loader, optimizer = pieces()
    with pytest.raises(OptionError, match=message):
        fit(model, never, loader, optimizer, progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_loaders_that_cannot_be_used():
    model, objective, _, optimizer = pieces()
    with pytest.raises(OptionError, match="needs a loader with a length"):
        fit(model, never, (b for b in numbered(3)), optimizer, epochs=1, progress=False)
    with pytest.raises(OptionError, match="yields no batch"):
        fit(model, never, [], optimizer, steps=1, progress=False)


def test_a_space_that_does_not_fit():
    model, _, loader, optimizer = pieces()
    objective = Stochastic(SubmodelSpace(height=[2]))
    with pytest.raises(DimensionError, match="height"):
        fit(model, objective, loader, optimizer, steps=1, progress=False)


def test_unwritable_directory_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model, _, loader, optimizer = pieces()
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            fit(
                model,
                never,
                loader,
                optimizer,
                steps=1,
                checkpoint_dir=directory,
                progress=False,
            )


def test_checkpoint_that_no_training_wrote(tmp_path):
    model, _, loader, optimizer = pieces()
    save_checkpoint(tmp_path, 1, model=model, optimizer=optimizer, objective=Stochastic(SPACE))
    with pytest.raises(CheckpointError, match="step-000001 was not written by fit"):
        fit(
            model,
            Stochastic(SPACE),
            loader,
            optimizer,
            steps=2,
            checkpoint_dir=tmp_path,
            progress=False,
        )


def test_what_resume_demands(tmp_path):
    model, objective, loader, optimizer = pieces()
    options = {"steps": 2, "checkpoint_dir": tmp_path, "progress": False}
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        fit(model, never, loader, optimizer, resume=True, **options)
    fit(model, objective, loader, optimizer, resume=False, **options)
    with pytest.raises(CheckpointError, match="step-000002 and resume is False"):
        fit(model, never, loader, optimizer, resume=False, **options)
    history = fit(model, objective, loader, optimizer, resume=True, **options)
    assert len(history.losses) == 2  # finished already: nothing is run, the history is whole
