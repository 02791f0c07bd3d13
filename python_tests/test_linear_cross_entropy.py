"""Cross-entropy under a linear head against the float64 oracle: losses and gradients."""

from contextlib import nullcontext

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.ops.backend import reference_only
from sorted_kernels.reference import linear_cross_entropy as reference
from support.cross_entropy import (
    DIFFERENT,
    EQUAL,
    REDUCTIONS,
    check,
    exit_counts,
    gradients_of,
    ours,
    plain,
    problem,
    reductions,
    upstream,
)
from support.oracle import DTYPES
from support.poison import transposed


@exit_counts
@reductions
@pytest.mark.parametrize("ignored", ["none", "some", "all but one"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_matches_the_oracle(exits, reduction, ignored, label_smoothing):
    for bias, kind in ((True, EQUAL), (False, DIFFERENT)):
        torch.manual_seed(1)
        values = problem(exits, ignored=ignored, bias=bias)
        dy = upstream(values[0], values[3], reduction, kind)
        check(*values, dy, reduction=reduction, label_smoothing=label_smoothing)


@pytest.mark.parametrize("rows, words, k, K", [(1, 1, 1, 1), (1, 2, 1, 3), (65, 13, 9, 9)])
@pytest.mark.parametrize("exits", [None, 3])
def test_odd_sizes_and_size_one(rows, words, k, K, exits):
    torch.manual_seed(2)
    values = problem(exits, rows, words, k, K, ignored="none")
    for reduction in REDUCTIONS:
        check(*values, upstream(values[0], values[3], reduction), reduction=reduction)


@exit_counts
@reductions
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_no_row_that_counts(exits, reduction, label_smoothing):
    """As torch: a mean over nothing is NaN, and its gradient zero."""
    hidden, weight, bias, target = problem(exits, ignored="all")
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    dy = upstream(hidden, target, reduction, EQUAL)
    found = gradients_of(ours, hidden, weight, bias, target, dy=dy, **options)
    stock = gradients_of(plain, hidden, weight[:, :5], bias, target, dy=dy, **options)
    torch.testing.assert_close(found[0], stock[0], equal_nan=True)
    for gradient, same in zip(found[1:], stock[1:], strict=True):
        assert not gradient.any() and not same.any()


def test_no_rows_at_all():
    hidden, weight, bias, target = problem(3, rows=0)
    for reduction, result in (("sum", 0.0), ("mean", float("nan"))):
        loss = ours(hidden, weight, bias, target, reduction=reduction)
        torch.testing.assert_close(loss, torch.full((3,), result), equal_nan=True)
    assert ours(hidden, weight, bias, target, reduction="none").shape == (3, 0)


def test_ignored_class_of_the_vocabulary():
    torch.manual_seed(3)
    hidden, weight, bias, target = problem(3, rows=20, ignored="none")
    target[::3] = 0
    check(hidden, weight, bias, target, torch.randn(3), ignore_index=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", [EQUAL, DIFFERENT])
@pytest.mark.parametrize("context", [nullcontext, reference_only], ids=["best", "plain torch"])
def test_dtypes(dtype, kind, context):
    torch.manual_seed(4)
    values = problem(3, 40, 130, 24, 31, dtype)
    for reduction in REDUCTIONS:
        dy = upstream(values[0], values[3], reduction, kind)
        with context():
            check(*values, dy, reduction=reduction)


def test_a_large_vocabulary():
    torch.manual_seed(5)
    check(*problem(2, 3, 49152, 16, 18), torch.randn(2), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", [EQUAL, DIFFERENT])
@pytest.mark.parametrize("context", [nullcontext, reference_only], ids=["best", "plain torch"])
def test_many_chunks(dtype, kind, context, monkeypatch):
    monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(reference, "MIN_ROWS", 5)
    torch.manual_seed(6)
    for ignored in ("none", "some"):
        values = problem(3, 11, 23, 6, 8, dtype, ignored=ignored)
        seen = []
        add = reference.Gradients.add
        with monkeypatch.context() as patch, context():
            patch.setattr(
                reference.Gradients,
                "add",
                lambda self, rows, dz, *rest, f=add, s=seen: (
                    s.append(len(dz)),
                    f(self, rows, dz, *rest),
                )[1],
            )
            check(*values, upstream(values[0], values[3], "mean", kind))
        assert max(seen) <= 5 and len(seen) >= 5


def test_any_layout_of_inputs():
    torch.manual_seed(7)
    hidden, weight, bias, target = problem(3, ignored="some")
    strided = torch.stack([target, target], 1)[:, 0].int()
    larger = torch.full((20, 12), float("nan"))
    larger[3:14, :9] = weight
    expected = gradients_of(ours, hidden, weight, bias, target, dy=torch.arange(3.0))
    found = gradients_of(
        ours, transposed(hidden), larger[3:14, :9], bias, strided, dy=torch.arange(3.0)
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_leading_axes_of_one_exit_and_of_many():
    torch.manual_seed(8)
    hidden, weight, bias, _ = problem(rows=2 * 3 * 4)
    hidden, target = hidden.view(2, 3, 4, 5), torch.randint(11, (2, 3, 4))
    assert ours(hidden, weight, bias, target).shape == ()
    assert ours(hidden, weight, bias, target[0]).shape == (2,)
    check(hidden, weight, bias, target, torch.randn(()))
    check(hidden, weight, bias, target[0], torch.randn(2, 3, 4), reduction="none")
    one = ours(hidden[0, 0, 0], weight, bias, target[0, 0, 0])
    torch.testing.assert_close(one, plain(hidden[:1, 0, 0], weight[:, :5], bias, target[0, 0, :1]))


@reductions
@pytest.mark.parametrize("kind", [EQUAL, DIFFERENT])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weights_of_exits(reduction, kind, dtype):
    torch.manual_seed(8)
    values = problem(3, 65, 37, 33, 40, dtype)
    dy = upstream(values[0], values[3], reduction, kind)
    for weights in ([0.3, 0.0, 2.5], torch.tensor([-1.0, 7.0, 0.5], dtype=torch.float64)):
        check(*values, dy, reduction=reduction, exit_weights=weights)


@pytest.mark.parametrize("reduction, exits", [("mean", 2), ("sum", None), ("none", 2)])
def test_gradcheck(reduction, exits):
    torch.manual_seed(9)
    hidden, weight, bias, target = problem(exits, 4, 5, 3, 4, torch.float64)
    weight = weight.nan_to_num()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    options = {"exit_weights": None if exits is None else [0.5, 3.0]}

    def function(hidden, weight, bias):
        return ours(
            hidden, weight, bias, target, reduction=reduction, label_smoothing=0.2, **options
        )

    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves)


def bad(**changes):
    hidden, weight, bias, target = problem(ignored="none")
    values = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
    return values | changes


_FULL = torch.zeros(7, dtype=torch.int64)
ERRORS = {
    "target dtype": (sk.DTypeError, "target has dtype torch.float32", {"target": torch.ones(7)}),
    "target shape": (sk.ShapeError, "target has shape", {"target": torch.ones(6).long()}),
    "target above": (sk.OptionError, "target has 11; allowed are 0..10", {"target": _FULL + 11}),
    "target below": (sk.OptionError, "target has -1; allowed", {"target": _FULL - 1}),
    "target device": (sk.DeviceError, "target is on meta", {"target": _FULL.to("meta")}),
    "smoothing": (sk.OptionError, "label_smoothing=1.5; allowed", {"label_smoothing": 1.5}),
    "reduction": (sk.OptionError, "reduction='max'; allowed are none", {"reduction": "max"}),
    "weights of no exits": (sk.ShapeError, "here no exits", {"exit_weights": [1.0] * 7}),
    "weights": (
        sk.ShapeError, r"shape \(3,\); .* here \(2,\)",
        {"hidden": torch.ones(2, 7, 5), "exit_weights": [1.0] * 3},
    ),
    "too wide": (sk.ShapeError, "hidden has 10 features", {"hidden": torch.ones(7, 10)}),
    "no exit": (sk.ShapeError, "at least one exit", {"hidden": torch.ones(0, 7, 5)}),
    "weight strides": (sk.StrideError, "weight has strides", {"weight": torch.ones(9, 11).T}),
    "weight dtype": (sk.DTypeError, "weight has dtype", {"weight": torch.ones(11, 9).half()}),
    "weight axes": (sk.ShapeError, "weight has 1 axes", {"weight": torch.ones(11)}),
    "bias size": (sk.ShapeError, "bias has 10 elements", {"bias": torch.ones(10)}),
    "bias dtype": (sk.DTypeError, "bias has dtype", {"bias": torch.ones(11).half()}),
    "hidden dtype": (sk.DTypeError, "hidden has dtype", {"hidden": torch.ones(7, 5).int()}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "words", "changes"), ERRORS.values(), ids=ERRORS)
def test_errors(error, words, changes):
    with pytest.raises(error, match=words):
        sk.linear_cross_entropy(**bad(**changes))
