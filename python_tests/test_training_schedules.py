from __future__ import annotations

import math

import pytest
import torch

from sorted_kernels.errors import OptionError
from sorted_kernels.training import cosine, linear


def rates(make, steps, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer, steps, **options)
    seen = []
    for _ in range(steps + 2):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine():
    seen = rates(cosine, 10, warmup=4)
    assert seen[:4] == pytest.approx([2 * k / 5 for k in (1, 2, 3, 4)])
    assert seen[4:10] == pytest.approx([1 + math.cos(math.pi * k / 6) for k in range(6)])
    assert seen[10:] == pytest.approx([0, 0], abs=1e-12)


def test_linear_with_a_rest():
    seen = rates(linear, 5, warmup=1, final=0.5)
    assert seen == pytest.approx([1.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0])


def test_cosine_with_a_rest():
    seen = rates(cosine, 4, final=0.1)
    assert seen[0] == 2.0
    assert seen[2] == pytest.approx(1.1)
    assert seen[4:] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("make", [cosine, linear])
@pytest.mark.parametrize(
    ("steps", "warmup", "message"),
    [(0, 0, "steps is 0"), (2.5, 0, "steps is 2.5"), (5, 5, "0 to 4"), (5, -1, "warmup is -1")],
)
def test_bad_schedule(make, steps, warmup, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(OptionError, match=message):
        make(optimizer, steps, warmup)
