"""``compare``: what is run, what is counted, what is kept, and the table."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.cli import comparison_report, main
from sorted_kernels.cli.comparison import NORMS, PRESETS, Comparison, Outcome, Run, Runner
from sorted_kernels.models import elastic_cpreresnet20
from sorted_kernels.training.baselines import METHODS, Counted, Hyperparameters, train

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = replace(PRESETS["small"], steps=2, seeds=(1,), widths=(4, 16))


def compare(*arguments, code=0):
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "--quiet", *map(str, arguments)])
    assert exit_.value.code == code


def read(folder):
    with open(folder / "comparison.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_which_submodels_each_method_trains():
    widths = (4, 8, 12, 16)
    chosen = {}
    for name, method in METHODS.items():
        objective = method.objective(widths, 3)
        chosen[name] = [[s["width"] for s in objective.choose()] for _ in range(200)]
    assert all(step == [16, 12, 8, 4] for step in chosen["slimmable"])
    for name in ("universal", "lcs"):
        assert all(len(step) == 4 and step[:2] == [16, 4] for step in chosen[name])
        assert {width for step in chosen[name] for width in step[2:]} == set(range(4, 17))
    assert METHODS["universal"].objective(widths, 0).distill
    assert not METHODS["lcs"].objective(widths, 0).distill
    assert {tuple(step) for step in chosen["sorted"]} == {(4,), (8,), (12,), (16,)}
    sums = {tuple(step) for step in chosen["sorted-sum"]}
    assert sums == {(4,), (8, 4), (12, 8, 4), (16, 12, 8, 4)}
    for name, steps in chosen.items():
        mean = sum(map(len, steps)) / len(steps)
        assert METHODS[name].passes(len(widths)) == pytest.approx(mean, abs=0.25)
        assert METHODS[name].objective(widths, 0).reduction == "sum"


def test_every_gradient_is_the_sum_of_the_methods_losses():
    """A step's gradient against one made by hand from the same sub-models' losses."""
    x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    for name in ("slimmable", "lcs", "sorted", "sorted-sum"):
        model = elastic_cpreresnet20(1, norm="instance")
        objective = METHODS[name].objective((4, 8, 16), 1)
        objective(model, (x, y))
        got = [param.grad.clone() for param in model.parameters()]
        model.zero_grad()
        for submodel in objective.last_submodels:
            with sk.active(model, submodel):
                torch.nn.functional.cross_entropy(model(x), y).backward()
        for ours, param in zip(got, model.parameters(), strict=True):
            torch.testing.assert_close(ours, param.grad, rtol=1e-3, atol=1e-4)


def test_budgets():
    plan = replace(PRESETS["small"], steps=100)
    steps = {name: plan.steps_of(name, "steps") for name in METHODS}
    assert set(steps.values()) == {100}
    steps = {name: plan.steps_of(name, "passes") for name in METHODS}
    assert steps == {
        "slimmable": 100, "universal": 100, "lcs": 100, "sorted": 400, "sorted-sum": 160,
        "alone": 100,
    }  # fmt: skip
    names = [run.name for run in plan.runs()]
    assert len(set(names)) == len(names)
    # 3 seeds; 6 methods on two norms, two of them with other steps a budget; and switchable NS
    assert len(names) == 3 * (2 * (6 + 2) + 1)
    for name, method in METHODS.items():
        run = Run(name, "instance", plan.steps_of(name, "passes"), 1)
        assert plan.passes_of(run) == pytest.approx(400), method


def test_presets_are_the_papers():
    paper = PRESETS["paper"]
    assert (paper.lr, paper.momentum, paper.weight_decay) == (0.1, 0.9, 5e-4)
    assert (paper.batch_size, paper.seeds) == (128, (40, 42, 1010, 4242))
    assert (paper.data, paper.steps, paper.augment) == ("cifar10", 200 * (50_000 // 128), True)
    assert len(PRESETS["small"].seeds) == 3


def stop_after(calls, original):
    left = iter(range(calls))

    def call(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    return call


def test_passes_are_counted_and_survive_a_checkpoint(tmp_path, monkeypatch):
    plan = replace(TINY, steps=6)
    data = plan.load(None)

    def make():
        torch.manual_seed(0)
        return elastic_cpreresnet20(1, norm="instance"), METHODS["sorted-sum"].objective((4, 16), 0)

    model, objective = make()
    loader = data.train_loader(32, seed=1)
    whole = train(model, objective, loader, 6, Hyperparameters(), progress=False)
    drawn = METHODS["sorted-sum"].objective((4, 16), 0)
    assert whole == sum(len(drawn.choose()) for _ in range(6)) > 6

    interrupted, again = make()
    monkeypatch.setattr(Counted, "__call__", stop_after(3, Counted.__call__))
    with pytest.raises(KeyboardInterrupt):
        train(
            interrupted, again, data.train_loader(32, seed=1), 6, Hyperparameters(),
            checkpoint_dir=tmp_path, progress=False,
        )  # fmt: skip
    monkeypatch.undo()
    resumed, fresh = make()
    passes = train(
        resumed, fresh, data.train_loader(32, seed=9), 6, Hyperparameters(),
        checkpoint_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert passes == whole
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_whole_command(tmp_path, capsys):
    arguments = ("--out", tmp_path, "--steps", 1, "--seeds", "1,2")
    arguments += ("--methods", "slimmable,sorted,alone")
    compare(*arguments)
    printed = capsys.readouterr().out
    assert "equal optimizer steps; instance norm" in printed
    assert "equal forward/backward passes" in printed
    assert "±" in printed
    rows = read(tmp_path)
    groups = {(row["budget"], row["norm"]) for row in rows}
    assert groups == {
        (budget, group)
        for budget in ("steps", "passes")
        for group in ("IN", "BN", "BN recalibrated")
    }
    titles = {row["method"] for row in rows if row["norm"] == "BN"}
    assert titles == {"NS", "NS (shared)", "SortedNet", "alone"}
    counts = {
        (row["budget"], row["method"]): (float(row["steps"]), float(row["passes"]))
        for row in rows
        if row["norm"] == "IN"
    }
    assert counts == {
        ("steps", "NS"): (1, 4), ("steps", "SortedNet"): (1, 1), ("steps", "alone"): (4, 4),
        ("passes", "NS"): (1, 4), ("passes", "SortedNet"): (4, 4), ("passes", "alone"): (4, 4),
    }  # fmt: skip
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert not list((tmp_path / "underway").glob("*"))
    again = json.loads((tmp_path / "comparison.json").read_text())
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "finished").iterdir()}
    compare(*arguments)
    assert "trainings were done before" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text()) == again
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "finished").iterdir()}


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ("--out", tmp_path, "--steps", 3, "--seeds", "1", "--norms", "instance")
    arguments += ("--methods", "slimmable,sorted", "--budgets", "steps")
    original = Runner._judge
    monkeypatch.setattr(Runner, "_judge", stop_after(1, original))
    compare(*arguments, code=130)
    done = list((tmp_path / "finished").iterdir())
    assert len(done) == 1
    kept = list((tmp_path / "underway").glob("*/*/*"))
    assert kept  # the second training's last checkpoint
    monkeypatch.setattr(Runner, "_judge", original)
    compare(*arguments)
    assert len(read(tmp_path)) == 8
    other = tmp_path / "other"
    compare("--out", other, *arguments[2:])
    assert [r["mean"] for r in read(other)] == [r["mean"] for r in read(tmp_path)]
    assert read(tmp_path)[-1]["seconds"] == ""  # interrupted: its time is not known


def test_results_do_not_depend_on_order_or_company(tmp_path):
    """A run alone gives what it gives among others."""
    shared = ("--steps", 2, "--seeds", "5", "--norms", "batch", "--budgets", "steps")
    compare("--out", tmp_path / "a", *shared, "--methods", "lcs,sorted-sum")
    compare("--out", tmp_path / "b", *shared, "--methods", "sorted-sum")
    first = [row for row in read(tmp_path / "a") if row["method"] == "SortedNet-sum"]
    second = read(tmp_path / "b")
    for row in (*first, *second):
        row.pop("seconds")
    assert first == second


def outcome(accuracy, recalibrated=None, steps=1, passes=4):
    return Outcome({4: accuracy, 16: 2 * accuracy}, recalibrated, steps, passes, 1.5)


def test_means_and_deviations():
    plan = replace(TINY, methods=("sorted",), norms=("batch",), budgets=("steps",), seeds=(1, 2))
    outcomes = {
        Run("sorted", "batch", 2, seed).name: outcome(value, {4: value / 2, 16: value / 4})
        for seed, value in ((1, 0.4), (2, 0.5))
    }
    plain, measured = comparison_report.columns(plan, outcomes, {4: 10**6, 16: 10**7})
    assert (plain.group, measured.group) == ("BN", "BN recalibrated")
    assert plain.mean(4) == pytest.approx(45) and plain.mean(16) == pytest.approx(90)
    assert plain.deviation(4) == pytest.approx(100 * math.sqrt(0.005))
    assert plain.average == pytest.approx(67.5)
    assert measured.mean(4) == pytest.approx(22.5)
    assert comparison_report.columns(plan, dict(list(outcomes.items())[:1]), {}) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "big"), "--preset"),
        (("--preset", "paper"), "--data is missing"),
        (("--preset", "paper", "--data", "nowhere"), "neither a file nor a folder"),
        (("--data", "x"), "digits need none"),
        (("--methods", "sorted,ofa"), "--methods"),
        (("--methods", "sorted,sorted"), "--methods"),
        (("--norms", "layer"), "--norms"),
        (("--budgets", "time"), "--budgets"),
        (("--seeds", "1,x"), "--seeds"),
        (("--seeds", "1,1"), "--seeds"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_bad_options(arguments, message, tmp_path, capsys):
    compare("--out", tmp_path, *arguments, code=2)
    assert message in capsys.readouterr().err


def test_a_folder_holds_one_comparison(tmp_path, capsys):
    replace(TINY, batch_size=32).write(tmp_path / "config.json")
    compare("--out", tmp_path, "--steps", 1, code=2)
    assert "other batch_size, widths" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"accuracy": {"x": 1}}', "{}"])
def test_a_damaged_result(tmp_path, content):
    plan: Comparison = TINY
    runner = Runner(plan, plan.load(None), tmp_path, device=torch.device("cpu"), progress=False)
    run = Run("sorted", "instance", 2, 1)
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / f"{run.name}.json").write_text(content)
    with pytest.raises(sk.CheckpointError, match="damaged"):
        runner.finished(run)


def test_norms_are_what_they_say():
    plan = TINY
    runner = Runner(plan, plan.load(None), None, device=torch.device("cpu"), progress=False)
    for norm in NORMS:
        model = runner._network(Run("slimmable", norm, 1, 1), 16, (4, 16))
        kind = torch.nn.InstanceNorm2d if norm == "instance" else torch.nn.BatchNorm2d
        assert isinstance(model.norm, kind)
        names = [name for name, _ in model.named_parameters()]
        assert any("switch" in name for name in names) == (norm == "switchable")
