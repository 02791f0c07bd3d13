"""Triton layer norm and RMS norm against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference import layer_norm as layer_reference  # noqa: E402
from sorted_kernels.reference import rms_norm as rms_reference  # noqa: E402
from sorted_kernels.triton import layer_norm, rms_norm  # noqa: E402
from sorted_kernels.triton.norm import MAX_FEATURES  # noqa: E402
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

EPS = 1e-5
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
# A narrow row, several rows a program, widths on both sides of the change to two kernels.
FIXED = [(1, 1), (300, 16), (37, 768), (3, 4097), (2, 8192), (2, 8208), (1, MAX_FEATURES)]


def as_double(*tensors):
    return [tensor.double() for tensor in tensors]


def check_statistics(actual, oracle):
    assert actual.dtype == torch.float32 and actual.shape == oracle.shape
    torch.testing.assert_close(actual.double(), oracle, rtol=2e-6, atol=1e-6)


def check_layer_norm(dtype, n, k, accumulate=(True, True)):
    x = inside(randn(n, k, dtype=dtype, seed=1), float("nan"))
    dy = inside(randn(n, k, dtype=dtype, seed=2, scale=n**-0.5), float("nan"))
    weight, bias = randn(k, dtype=dtype, seed=3), randn(k, dtype=dtype, seed=4)
    parent, bias_parent = poisoned(weight, k + 5), poisoned(bias, k + 5)
    y, mean, rstd = layer_norm.layer_norm(x, parent, bias_parent, EPS)
    same, same_mean, same_rstd = layer_reference.layer_norm(x, weight, bias, EPS)
    oracle, mean64, rstd64 = layer_reference.layer_norm(*as_double(x, weight, bias), EPS)
    assert_accurate(y, same, oracle)
    check_statistics(mean, mean64)
    check_statistics(rstd, rstd64)

    grads = [Patterned((k + 5,), (k,), dtype) for _ in range(2)]
    same_grads = [grad.start.clone() for grad in grads]
    oracle_grads = [grad.start.double() for grad in grads]
    dx = layer_norm.layer_norm_backward_into(
        dy, x, mean, rstd, parent, grads[0].view, grads[1].view, *accumulate
    )
    same_dx = layer_reference.layer_norm_backward_into(
        dy, x, same_mean, same_rstd, weight, *same_grads, *accumulate
    )
    oracle_dx = layer_reference.layer_norm_backward_into(
        *as_double(dy, x), mean64, rstd64, weight.double(), *oracle_grads, *accumulate
    )
    assert_accurate(dx, same_dx, oracle_dx)
    for grad, same_grad, oracle_grad in zip(grads, same_grads, oracle_grads, strict=True):
        assert_accurate(grad.view, same_grad, oracle_grad)
        grad.assert_rest_intact()


def check_rms_norm(dtype, n, k, accumulate=True):
    x = inside(randn(n, k, dtype=dtype, seed=1), float("nan"))
    dy = inside(randn(n, k, dtype=dtype, seed=2, scale=n**-0.5), float("nan"))
    weight = randn(k, dtype=dtype, seed=3)
    parent = poisoned(weight, k + 5)
    y, rstd = rms_norm.rms_norm(x, parent, EPS)
    same, same_rstd = rms_reference.rms_norm(x, weight, EPS)
    oracle, rstd64 = rms_reference.rms_norm(*as_double(x, weight), EPS)
    assert_accurate(y, same, oracle)
    check_statistics(rstd, rstd64)

    grad = Patterned((k + 5,), (k,), dtype)
    same_grad, oracle_grad = grad.start.clone(), grad.start.double()
    dx = rms_norm.rms_norm_backward_into(dy, x, rstd, parent, grad.view, accumulate)
    same_dx = rms_reference.rms_norm_backward_into(dy, x, same_rstd, weight, same_grad, accumulate)
    oracle_dx = rms_reference.rms_norm_backward_into(
        *as_double(dy, x), rstd64, weight.double(), oracle_grad, accumulate
    )
    assert_accurate(dx, same_dx, oracle_dx)
    assert_accurate(grad.view, same_grad, oracle_grad)
    grad.assert_rest_intact()


@by_dtype
@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(1, 70), k=st.integers(1, 70), add=st.tuples(st.booleans(), st.booleans()))
def test_layer_norm_any_size(dtype, n, k, add):
    check_layer_norm(dtype, n, k, add)


@by_dtype
@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(1, 70), k=st.integers(1, 70), add=st.booleans())
def test_rms_norm_any_size(dtype, n, k, add):
    check_rms_norm(dtype, n, k, add)


@pytest.mark.parametrize(("n", "k"), FIXED)
@by_dtype
def test_layer_norm_fixed_sizes(dtype, n, k):
    check_layer_norm(dtype, n, k)


@pytest.mark.parametrize(("n", "k"), FIXED)
@by_dtype
def test_rms_norm_fixed_sizes(dtype, n, k):
    check_rms_norm(dtype, n, k)


@pytest.mark.parametrize("k", [33, 8208])
def test_each_gradient_alone(k):
    x, dy = randn(2, 3, k, dtype=torch.float32, seed=1), randn(2, 3, k, dtype=torch.float32, seed=2)
    weight = randn(k, dtype=torch.float32, seed=3)
    _, mean, rstd = layer_norm.layer_norm(x, weight, None, EPS)

    def run(module, need_dx, outs):
        return module.layer_norm_backward_into(
            dy, x, mean, rstd, weight, *outs, False, False, need_dx
        )

    for need_dx, has_weight, has_bias in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)]:
        outs = [
            torch.full((k,), 7.0, device=DEVICE) if has else None for has in (has_weight, has_bias)
        ]
        expected = [None if out is None else out.clone() for out in outs]
        dx = run(layer_norm, bool(need_dx), outs)
        expected_dx = run(layer_reference, bool(need_dx), expected)
        assert (dx is None) == (expected_dx is None)
        for ours, theirs in zip([dx, *outs], [expected_dx, *expected], strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_affine_parameters():
    x = randn(2, 3, 33, dtype=torch.float32, seed=1)
    dy = randn(2, 3, 33, dtype=torch.float32, seed=2)
    y, mean, rstd = layer_norm.layer_norm(x, None, None, EPS)
    assert y.shape == x.shape and mean.shape == rstd.shape == (2, 3, 1)
    none = (None, None, None, False, False)
    dx = layer_norm.layer_norm_backward_into(dy, x, mean, rstd, *none)
    _, mean64, rstd64 = layer_reference.layer_norm(x.double(), None, None, EPS)
    oracle = layer_reference.layer_norm_backward_into(*as_double(dy, x), mean64, rstd64, *none)
    torch.testing.assert_close(dx.double(), oracle, rtol=1e-5, atol=1e-5)
    y, rstd = rms_norm.rms_norm(x, None, EPS)
    assert_accurate(
        y, rms_reference.rms_norm(x, None, EPS)[0], rms_reference.rms_norm(x.double(), None, EPS)[0]
    )
    dx = rms_norm.rms_norm_backward_into(dy, x, rstd, None, None, False)
    rstd64 = rms_reference.rms_norm(x.double(), None, EPS)[1]
    oracle = rms_reference.rms_norm_backward_into(*as_double(dy, x), rstd64, None, None, False)
    torch.testing.assert_close(dx.double(), oracle, rtol=1e-5, atol=1e-5)


def test_no_rows():
    x, weight = torch.empty(0, 24, device=DEVICE), torch.ones(30, device=DEVICE)
    y, mean, rstd = layer_norm.layer_norm(x, weight, weight, EPS)
    assert y.shape == (0, 24) and mean.shape == rstd.shape == (0, 1)
    grad, bias_grad = Patterned((30,), (24,), x.dtype), Patterned((30,), (24,), x.dtype)
    dx = layer_norm.layer_norm_backward_into(
        x, x, mean, rstd, weight, grad.view, bias_grad.view, True, False
    )
    assert dx is not None and dx.shape == (0, 24)
    assert torch.equal(grad.view, grad.start) and not bias_grad.view.any()
    grad.assert_rest_intact()
    bias_grad.assert_rest_intact()


def test_longer_rows_than_registers_hold_take_the_reference():
    k = MAX_FEATURES + 1
    x = randn(2, k, dtype=torch.float32, seed=1)
    weight = randn(k, dtype=torch.float32, seed=2)
    y, rstd = rms_norm.rms_norm(x, weight, EPS)
    assert torch.equal(y, rms_reference.rms_norm(x, weight, EPS)[0])
    grad, expected = torch.zeros_like(weight), torch.zeros_like(weight)
    dx = rms_norm.rms_norm_backward_into(x, x, rstd, weight, grad, False)
    other = rms_reference.rms_norm_backward_into(x, x, rstd, weight, expected, False)
    assert torch.equal(dx, other) and torch.equal(grad, expected)
