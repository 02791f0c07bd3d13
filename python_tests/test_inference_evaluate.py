"""Evaluation of a space: the numbers, the loader, and what is left behind."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import sorted_kernels as sk
from sorted_kernels import OptionError, ShapeError, SpaceError, Submodel, SubmodelSpace
from sorted_kernels.inference import evaluate
from sorted_kernels.models import elastic_residual_mlp
from sorted_kernels.nn import current

SPACE = SubmodelSpace(depth=[1, 3], width=[1, 2, 4])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return elastic_residual_mlp(5, width=8, hidden=8, depth=3, classes=4, widths=4)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(23, 5, generator=generator), torch.randint(4, (23,), generator=generator)


def batches(data, sizes=(8, 8, 7)):
    return list(zip(data[0].split(list(sizes)), data[1].split(list(sizes)), strict=True))


def by_hand(model, data, submodel, function):
    """The metric of one exported sub-model over all samples at once."""
    with torch.no_grad():
        return float(function(sk.export(model, submodel).eval()(data[0]), data[1]))


@pytest.mark.parametrize(
    ("metric", "function", "higher"),
    [
        ("accuracy", lambda y, t: (y.argmax(-1) == t).double().mean(), True),
        ("loss", cross_entropy, False),
    ],
    ids=["accuracy", "loss"],
)
def test_metrics_equal_those_of_exported_submodels(model, data, metric, function, higher):
    results = evaluate(model, SPACE, batches(data), metric=metric)
    assert [r.submodel for r in results] == list(SPACE)
    assert (results.metric, results.higher_is_better) == (metric, higher)
    for row in results:
        assert row.metric == pytest.approx(by_hand(model, data, row.submodel, function), rel=1e-5)
        assert row.parameters == sk.count_parameters(model, row.submodel)
        assert row.flops == sk.count_flops(model, row.submodel, (1, 5))
        assert row.latency_ms is None


def test_a_loader_that_shuffles_is_read_once_and_shows_all_the_same_samples(model, data):
    class Shuffling:
        passes = 0

        def __iter__(self):
            self.passes += 1
            order = torch.randperm(23)
            return iter(batches((data[0][order], data[1][order])))

    loader = Shuffling()
    shuffled = evaluate(model, SPACE, loader)
    assert loader.passes == 1
    assert shuffled == evaluate(model, SPACE, batches(data))


def test_uneven_batches_count_by_their_samples(model, data):
    even = evaluate(model, SPACE, batches(data, (23,)), metric="loss")
    uneven = evaluate(model, SPACE, batches(data, (20, 1, 2)), metric="loss")
    for a, b in zip(even, uneven, strict=True):
        assert a.metric == pytest.approx(b.metric, rel=1e-6)


def test_targets_of_minus_100_are_left_out(model, data):
    targets = data[1].clone()
    targets[::2] = -100
    kept = (data[0][1::2], data[1][1::2])
    for metric in ("accuracy", "loss"):
        masked = evaluate(model, SPACE, [(data[0], targets)], metric=metric)
        alone = evaluate(model, SPACE, [kept], metric=metric)
        for a, b in zip(masked, alone, strict=True):
            assert a.metric == pytest.approx(b.metric, rel=1e-6)


def test_all_targets_left_out_is_not_a_number(model, data):
    results = evaluate(model, SPACE, [(data[0], torch.full((23,), -100))])
    assert all(math.isnan(row.metric) for row in results)


def test_a_function_as_metric_and_as_forward(model, data):
    def mean_square(output, targets):
        return float((output[:, 0] - targets).square().sum()), len(targets)

    def forward(model, inputs):
        return model(inputs["x"])

    loader = [({"x": x}, t) for x, t in batches(data)]
    results = evaluate(
        model, SPACE, loader, metric=mean_square, higher_is_better=False, forward=forward,
        input_shape=(2, 5),
    )  # fmt: skip
    assert (results.metric, results.higher_is_better) == ("mean_square", False)
    wanted = by_hand(model, data, results[0].submodel, lambda y, t: (y[:, 0] - t).square().mean())
    assert results[0].metric == pytest.approx(wanted, rel=1e-5)
    assert results[0].flops == sk.count_flops(model, results[0].submodel, (2, 5))


def test_latency_is_measured_where_asked(model, data):
    results = evaluate(model, [Submodel(depth=1, width=1)], batches(data), latency=True)
    assert results[0].latency_ms > 0


def state(model):
    return [module.training for module in model.modules()], current(model)


def test_modes_submodel_and_gradients_are_left_as_they_were(model, data):
    model.train()
    model.blocks.all_blocks()[1].eval()
    sk.activate(model, Submodel(depth=2, width=3))
    before = state(model)
    seen = []

    def watching(model, inputs):
        seen.append((torch.is_grad_enabled(), any(m.training for m in model.modules())))
        return model(inputs)

    evaluate(model, SPACE, batches(data), forward=watching)
    assert set(seen) == {(False, False)} and len(seen) == 3 * len(SPACE)
    assert state(model) == before and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_they_are_restored_after_an_error_too(model, data):
    sk.activate(model.train(), Submodel(depth=2, width=3))
    before = state(model)

    def failing(model, inputs):
        raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"):
        evaluate(model, SPACE, batches(data), forward=failing)
    with pytest.raises(sk.DimensionError, match="depth=9"):
        evaluate(model, [Submodel(depth=1), Submodel(depth=9)], batches(data))
    assert state(model) == before


def test_wrong_arguments(model, data):
    loader = batches(data)
    with pytest.raises(SpaceError, match="empty"):
        evaluate(model, [], loader)
    with pytest.raises(OptionError, match="'bleu' is unknown.*accuracy"):
        evaluate(model, SPACE, loader, metric="bleu")
    with pytest.raises(OptionError, match="loader is empty"):
        evaluate(model, SPACE, [])
    with pytest.raises(OptionError, match="inputs, targets"):
        evaluate(model, SPACE, [data[0]])
    with pytest.raises(OptionError, match="input_shape"):
        evaluate(model, SPACE, [((data[0],), data[1])])
    with pytest.raises(OptionError, match="forward="):
        evaluate(model, SPACE, loader, forward=lambda m, x: {"logits": m(x)})
    with pytest.raises(ShapeError, match=r"\(8, 4\).*\(8, 1\)"):
        evaluate(model, SPACE, [(x, t[:, None]) for x, t in loader])


def test_nothing_is_printed_without_a_terminal(model, data, capfd):
    evaluate(model, SPACE, batches(data))
    assert capfd.readouterr() == ("", "")


def test_progress_bar_counts_every_forward_on_a_terminal(model, data, monkeypatch):
    progress = pytest.importorskip("rich.progress")
    counted = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress.Progress, "advance", lambda self, task: counted.append(task))
    evaluate(model, SPACE, iter(batches(data)))  # an iterator: its length is unknown
    assert len(counted) == 3 * len(SPACE)
    evaluate(model, SPACE, batches(data), progress=False)
    assert len(counted) == 3 * len(SPACE)
