"""Triton embedding against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference import embedding as reference  # noqa: E402
from sorted_kernels.triton import embedding  # noqa: E402
from support.triton_numerics import (  # noqa: E402
    DEVICE,
    DTYPES,
    Patterned,
    assert_accurate,
    dtype_id,
    inside,
    poisoned,
    randn,
)

V, K = 23, 300
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def random_indices(*shape: int, seed: int = 5, high: int = V) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator).to(DEVICE)


def check_backward(dtype, n, k, accumulate, padding_idx, indices=None):
    indices = random_indices(n) if indices is None else indices
    dy = inside(randn(indices.numel(), k, dtype=dtype, seed=1), float("nan"))
    grad = Patterned((V, K), (V, k), dtype)
    same, oracle = grad.start.clone(), grad.start.double()
    embedding.embedding_backward_into(dy, indices, grad.view, accumulate, padding_idx)
    reference.embedding_backward_into(dy, indices, same, accumulate, padding_idx)
    reference.embedding_backward_into(dy.double(), indices, oracle, accumulate, padding_idx)
    assert_accurate(grad.view, same, oracle)
    grad.assert_rest_intact()
    if padding_idx >= 0:
        expected = grad.start[padding_idx] if accumulate else torch.zeros_like(grad.start[0])
        assert torch.equal(grad.view[padding_idx], expected)


@by_dtype
@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(1, 70), k=st.integers(1, 70))
def test_forward_any_size(dtype, n, k):
    weight = poisoned(randn(V, k, dtype=dtype, seed=1), V, K)
    indices = random_indices(n)
    assert torch.equal(embedding.embedding(indices, weight, k), weight[indices, :k])


@by_dtype
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    accumulate=st.booleans(),
    padding_idx=st.integers(-1, V - 1),
)
def test_backward_any_size(dtype, n, k, accumulate, padding_idx):
    check_backward(dtype, n, k, accumulate, padding_idx)


@by_dtype
def test_full_width_in_several_column_blocks(dtype):
    weight, indices = randn(V, K, dtype=dtype, seed=1), random_indices(3, 7)
    assert torch.equal(embedding.embedding(indices, weight, K), weight[indices])
    check_backward(dtype, 30, K, True, -1)


def test_one_index_many_times_and_rows_nobody_names():
    for accumulate in (True, False):
        indices = torch.full((100,), 4, device=DEVICE)
        check_backward(torch.float32, 100, 33, accumulate, -1, indices)
        check_backward(torch.float32, 100, 33, accumulate, 4, indices)


def test_int32_indices_with_strides():
    weight = randn(V, K, dtype=torch.float32, seed=1)
    indices = random_indices(6, 8).int().T[:, ::2]
    assert torch.equal(embedding.embedding(indices, weight, 33), weight[indices, :33])
    check_backward(torch.float32, 24, 33, True, 2, indices)


def test_no_indices():
    indices = torch.empty(0, dtype=torch.int64, device=DEVICE)
    weight = randn(V, K, dtype=torch.float32, seed=1)
    assert embedding.embedding(indices, weight, 33).shape == (0, 33)
    grad = Patterned((V, K), (V, 33), torch.float32)
    dy = torch.empty(0, 33, device=DEVICE)
    embedding.embedding_backward_into(dy, indices, grad.view, True)
    assert torch.equal(grad.full, grad.before)
    embedding.embedding_backward_into(dy, indices, grad.view, False)
    assert not grad.view.any()
    grad.assert_rest_intact()


def test_index_outside_the_table_reads_nothing_and_writes_nothing():
    table = randn(V, K, dtype=torch.float32, seed=1)
    indices = torch.tensor([0, V - 2, V - 1, -1], device=DEVICE)
    y = embedding.embedding(indices, table[: V - 1], 33)  # the parent goes on after row V - 2
    assert torch.isnan(y).all(1).tolist() == [False, False, True, True]
    grad = Patterned((V, K), (V - 1, 33), torch.float32)
    dy = randn(4, 33, dtype=torch.float32, seed=2)
    embedding.embedding_backward_into(dy, indices, grad.view, True)
    grad.assert_rest_intact()
    assert torch.equal(grad.view[1:-1], grad.start[1:-1])
