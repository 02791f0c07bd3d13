"""Metrics over whole data sets, as GLUE has them."""

import math

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels import OptionError, ShapeError
from sorted_kernels.inference.metrics import WHOLE_METRICS


def classes(seed, number):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(number, (97,), generator=generator)
    logits = torch.randn(97, number, generator=generator)
    return logits + torch.nn.functional.one_hot(targets, number), targets


def in_batches(output, targets):
    return list(zip(output.split(10), targets.split(10), strict=True))


def measured(name, output, targets):
    metric = WHOLE_METRICS[name]
    return metric.of([metric.pair(*batch) for batch in in_batches(output, targets)])


def test_f1_and_matthews_by_the_confusion_matrix():
    logits, targets = classes(0, 2)
    hit = logits.argmax(-1)
    tp, tn = ((hit == c) & (targets == c) for c in (1, 0))
    fp, fn = ((hit == c) & (targets != c) for c in (1, 0))
    tp, tn, fp, fn = (float(part.sum()) for part in (tp, tn, fp, fn))
    assert measured("f1", logits, targets) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert measured("matthews", logits, targets) == pytest.approx((tp * tn - fp * fn) / spread)


def test_correlations_by_hand():
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(97, generator=generator)
    output = (targets + torch.randn(97, generator=generator)).exp()[:, None]
    pearson = torch.corrcoef(torch.stack([output[:, 0], targets]).double())[0, 1]
    assert measured("pearson", output, targets) == pytest.approx(float(pearson))
    ranks = torch.stack([output[:, 0], targets]).argsort(-1).argsort(-1).double()
    assert measured("spearman", output, targets) == pytest.approx(
        float(torch.corrcoef(ranks)[0, 1])
    )


def test_bad_shapes():
    with pytest.raises(ShapeError, match=r"\(5, 2\).*\(4,\)"):
        WHOLE_METRICS["f1"].pair(torch.randn(5, 2), torch.zeros(4))
    with pytest.raises(ShapeError, match=r"\(5, 2\).*\(5,\)"):
        WHOLE_METRICS["pearson"].pair(torch.randn(5, 2), torch.zeros(5))
    with pytest.raises(OptionError, match="forward="):
        WHOLE_METRICS["f1"].pair({"logits": 1}, torch.zeros(4))


def test_evaluate_takes_them():
    torch.manual_seed(2)
    model = sk.models.elastic_residual_mlp(width=16, hidden=16, depth=2, classes=2, widths=2)
    x, targets = torch.randn(97, 64), torch.randint(2, (97,))
    space = sk.SubmodelSpace(depth=[1, 2], width=[1, 2])
    results = sk.inference.evaluate(model, space, in_batches(x, targets), metric="matthews")
    for row in results:
        with sk.active(model, row.submodel), torch.no_grad():
            assert row.metric == pytest.approx(measured("matthews", model(x), targets))
