"""Triton's ragged embedding against a loop over runs in float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference import embedding as reference  # noqa: E402
from sorted_kernels.triton import embedding  # noqa: E402
from support import ragged  # noqa: E402
from support.triton_numerics import (  # noqa: E402
    DEVICE,
    DTYPES,
    AddressWatch,
    Patterned,
    assert_accurate,
    dtype_id,
    inside,
    poisoned,
    randn,
)

V = 23
NAN = float("nan")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
PROBLEMS = {
    "one": [(1, 1, 1)],
    "every_place": [(1, 1, 60 - 3 * i) for i in range(20)],
    "aligned": [(3, 1, 304), (15, 1, 256), (9, 1, 16)],
    "odd": [(30, 1, 301), (15, 1, 255), (9, 1, 1)],
}
by_problem = pytest.mark.parametrize("runs", PROBLEMS.values(), ids=PROBLEMS)


def random_indices(n: int, low: int = 0, high: int = V) -> torch.Tensor:
    return torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(5)).to(DEVICE)


def add_up(dy, indices, runs, start, padding_idx):
    """The reference's gradient of each run, added to ``start``."""
    total = start.clone()
    for rows, _, width in ragged.spans(runs):
        reference.embedding_backward_into(
            dy[rows, :width], indices[rows], total[:, :width], True, padding_idx
        )
    return total


def check(runs, dtype, accumulate, padding_idx=-1):
    n, _, k = ragged.largest(runs)
    indices = random_indices(n)
    weight = inside(poisoned(randn(V, k, dtype=dtype, seed=1), V, k + 3), NAN)
    y = embedding.ragged_embedding(indices, weight, runs)
    assert y.shape == (n, k) and y.is_contiguous()
    for rows, _, width in ragged.spans(runs):
        assert torch.equal(y[rows, :width], weight[indices[rows], :width])
        assert not y[rows, width:].any()

    dy = ragged.fill_past(randn(n, k + 1, dtype=dtype, seed=2), runs, NAN, features="in")
    dy, grad = inside(dy, NAN), Patterned((V, k + 3), (V, k), dtype)
    start = accumulate * grad.start
    embedding.ragged_embedding_backward_into(dy, indices, runs, grad.full, accumulate, padding_idx)
    same = add_up(dy, indices, runs, start, padding_idx)
    exact = add_up(dy.double(), indices, runs, start.double(), padding_idx)
    assert_accurate(grad.view, same, exact)
    grad.assert_rest_intact()
    if padding_idx >= 0:
        assert torch.equal(grad.view[padding_idx], start[padding_idx])


def test_random_problems(ragged_runs):
    rows = ragged.largest(ragged_runs)[0]
    few = [(min(count, 4), m, k) for count, m, k in ragged_runs]  # a program for each place
    check(few, DTYPES[rows % 3], rows % 2 == 0, padding_idx=rows % V - 1)


@by_problem
@by_dtype
def test_fixed_problems(dtype, runs):
    check(runs, dtype, True)
    check(runs, dtype, False, padding_idx=3)


def test_index_outside_the_table_is_nan_within_its_width():
    weight = randn(V, 40, dtype=torch.float32, seed=1)
    indices = torch.tensor([V, 0, -1], device=DEVICE)
    y = embedding.ragged_embedding(indices, weight, [(1, 1, 33), (2, 1, 20)])
    assert torch.isnan(y).sum(1).tolist() == [33, 0, 20]
    assert not y[2, 20:].any()


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows addresses")
def test_nothing_past_a_width_is_read(monkeypatch):
    """A batch of one run, cut out of a larger one: its width is less than what dy holds."""
    weight, grad, dy = (torch.zeros(n, 900)[2:-2, 300:333] for n in (V + 4, V + 4, 24))
    watch = AddressWatch(weight=weight, grad=grad, dy=dy)
    watch.install(monkeypatch)
    indices, runs = random_indices(20, -1, V + 1), [(20, 1, 33)]
    embedding.ragged_embedding(indices, weight, runs)
    wide = dy.as_strided((20, 100), dy.stride())
    embedding.ragged_embedding_backward_into(wide, indices, runs, grad, True)
    assert watch.touched == {"weight", "grad", "dy"}
