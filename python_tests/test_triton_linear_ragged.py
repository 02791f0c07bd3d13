"""Triton's ragged linear against a loop over runs in float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference import linear as reference  # noqa: E402
from sorted_kernels.triton import linear, row_sizes  # noqa: E402
from sorted_kernels.triton.gemm_config import FLOAT_CONFIGS, HALF_CONFIGS, GemmConfig  # noqa: E402
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

NAN = float("nan")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
SMALL = GemmConfig(16, 16, 16, num_warps=4, num_stages=2)
SMALL_STEPS = GemmConfig(32, 16, 32, num_warps=4, num_stages=2)

# Each kind of tile: rows of one run, of two, of many; sizes that no block divides, and that all do.
ODD = [(1, 70, 77), (37, 70, 50), (3, 33, 50), (1, 33, 21), (1, 2, 1), (5, 1, 1)]
ALIGNED = [(20, 96, 112), (20, 96, 48), (1, 48, 48), (30, 32, 16), (2, 16, 16)]
EVERY_ROW = [(1, 40 - i, 60 - 2 * i) for i in range(20)]
ONE = [(1, 1, 1)]
PROBLEMS = {"odd": ODD, "aligned": ALIGNED, "every_row": EVERY_ROW, "one": ONE}
by_problem = pytest.mark.parametrize("runs", PROBLEMS.values(), ids=PROBLEMS)


def operands(runs, dtype):
    """x and dy in larger buffers, NaN past each row's sizes and all around; a poisoned weight."""
    n, m, k = ragged.largest(runs)
    x = randn(n, k + 2, dtype=dtype, seed=1)
    dy = randn(n, m + 1, dtype=dtype, seed=2, scale=n**-0.5)
    block, bias = randn(m, k, dtype=dtype, seed=3, scale=k**-0.5), randn(m, dtype=dtype, seed=4)
    ragged.fill_past(x, runs, NAN, features="in")
    ragged.fill_past(dy, runs, NAN, features="out")
    return inside(x, NAN), inside(dy, NAN), block, bias


def check_forward(runs, dtype, activation="none", config=None):
    n, m, k = ragged.largest(runs)
    x, _, block, bias = operands(runs, dtype)
    weight = inside(poisoned(block, m + 3, k + 5), NAN)
    y, z = linear.ragged_linear(
        x, weight, poisoned(bias, m + 3), runs, activation, True, config=config
    )
    same = ragged.ragged_linear(x, block, bias, runs)
    exact = ragged.ragged_linear(x.double(), block.double(), bias.double(), runs)
    assert y.dtype == dtype and y.is_contiguous()
    assert_accurate(y, reference.activate(same, activation), reference.activate(exact, activation))
    for rows, out_features, _ in ragged.spans(runs):
        assert not y[rows, out_features:].any()
    if activation in ("gelu", "silu"):
        assert_accurate(z, same, exact)
    else:
        assert z.shape == (0,)


def check_backward(runs, dtype, accumulate, config=None):
    n, m, k = ragged.largest(runs)
    x, dy, block, _ = operands(runs, dtype)
    dx = linear.ragged_dgrad(dy, poisoned(block, m + 3, k + 5), runs, config=config)
    exact = ragged.ragged_dgrad(dy.double(), block.double(), runs)
    assert dx.dtype == dtype and dx.is_contiguous()
    assert_accurate(dx, ragged.ragged_dgrad(dy, block, runs), exact)
    for rows, _, in_features in ragged.spans(runs):
        assert not dx[rows, in_features:].any()

    grad, bias_grad = Patterned((m + 3, k + 5), (m, k), dtype), Patterned((m + 3,), (m,), dtype)
    starts = [accumulate * grad.start, accumulate * bias_grad.start]
    linear.ragged_wgrad_into(dy, x, runs, grad.full, accumulate, config=config)
    linear.ragged_bias_grad_into(dy, runs, bias_grad.full, accumulate)
    same = ragged.ragged_wgrad(dy, x, runs, starts[0])
    exact = ragged.ragged_wgrad(dy.double(), x.double(), runs, starts[0].double())
    assert_accurate(grad.view, same, exact)
    same = ragged.ragged_bias_grad(dy, runs, starts[1])
    exact = ragged.ragged_bias_grad(dy.double(), runs, starts[1].double())
    assert_accurate(bias_grad.view, same, exact)
    grad.assert_rest_intact()
    bias_grad.assert_rest_intact()


def test_random_problems(ragged_runs):
    rows = ragged.largest(ragged_runs)[0]
    dtype = DTYPES[rows % 3]
    check_forward(ragged_runs, dtype, reference.ACTIVATIONS[rows % 4])
    check_backward(ragged_runs, dtype, rows % 2 == 0)


@by_problem
@by_dtype
def test_many_tiles(runs, dtype):
    config = SMALL if dtype == torch.float16 else SMALL_STEPS
    check_forward(runs, dtype, "gelu", config)
    check_backward(runs, dtype, True, config)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.float32, config) for config in FLOAT_CONFIGS]
    + [(torch.bfloat16, config) for config in HALF_CONFIGS],
    ids=lambda value: dtype_id(value) if isinstance(value, torch.dtype) else f"{value.block_n}",
)
def test_every_tiling(dtype, config):
    for runs in (ODD, [(70, 144, 144), (70, 80, 144), (10, 16, 16)]):
        check_forward(runs, dtype, "relu", config)
        check_backward(runs, dtype, False, config)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation(activation):
    check_forward(ODD, torch.bfloat16, activation)
    x, _, block, bias = operands(ODD, torch.float32)
    y, z = linear.ragged_linear(x, block, None, ODD, activation, False)
    exact = ragged.ragged_linear(x.double(), block.double(), None, ODD)
    same = ragged.ragged_linear(x, block, None, ODD)
    assert_accurate(y, reference.activate(same, activation), reference.activate(exact, activation))
    assert z.shape == (0,)


@by_dtype
@pytest.mark.parametrize("sizes", [(64, 96), (61, 93)], ids=["aligned", "odd"])
def test_one_run_is_the_uniform_linear_bit_for_bit(dtype, sizes):
    runs = [(50, *sizes)]
    config = SMALL_STEPS
    x, dy, block, bias = operands(runs, dtype)
    m, k = sizes
    pair = linear.ragged_linear(x, block, bias, runs, "gelu", True, config=config)
    uniform_pair = linear.linear(x[:, :k], block, bias, m, "gelu", True, config=config)
    assert all(map(torch.equal, pair, uniform_pair))
    uniform = linear.linear_dgrad(dy[:, :m], block, k, config=config)
    assert torch.equal(linear.ragged_dgrad(dy, block, runs, config=config), uniform)
    grads = torch.zeros(2, m, k, dtype=dtype, device=DEVICE)
    linear.ragged_wgrad_into(dy, x, runs, grads[0], False, config=config)
    linear.linear_wgrad_into(dy[:, :m], x[:, :k], grads[1], False, config=config)
    assert torch.equal(grads[0], grads[1])


def test_float32_gradient_of_bfloat16_operands():
    x, dy, _, _ = operands(ODD, torch.bfloat16)
    grad = Patterned((80, 80), (70, 77), torch.float32)
    linear.ragged_wgrad_into(dy, x, ODD, grad.full, True)
    same = ragged.ragged_wgrad(dy.float(), x.float(), ODD, grad.start)
    assert_accurate(
        grad.view, same, ragged.ragged_wgrad(dy.double(), x.double(), ODD, grad.start.double())
    )
    grad.assert_rest_intact()


def test_bias_gradient_of_many_rows_takes_two_stages():
    runs = [(700, 70, 1), (1500, 41, 1), (800, 3, 1)]
    dy = ragged.fill_past(
        randn(3000, 70, dtype=torch.float32, seed=1, scale=0.02), runs, NAN, features="out"
    )
    grad = Patterned((75,), (70,), torch.float32)
    linear.ragged_bias_grad_into(dy, runs, grad.full, True)
    same = ragged.ragged_bias_grad(dy, runs, grad.start)
    assert_accurate(
        grad.view, same, ragged.ragged_bias_grad(dy.double(), runs, grad.start.double())
    )
    grad.assert_rest_intact()


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows addresses")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@by_problem
def test_addresses(monkeypatch, dtype, runs):
    """Operands are read inside their largest row's sizes only, gradients written there only."""
    n, m, k = ragged.largest(runs)

    def cut_out(*sizes):
        parent = torch.zeros([size + 300 for size in sizes], dtype=dtype)
        return parent[tuple(slice(150, 150 + size) for size in sizes)]

    x, dy, weight, grad = cut_out(n, k), cut_out(n, m), cut_out(m, k), cut_out(m, k)
    bias, bias_grad = cut_out(m), cut_out(m)
    watch = AddressWatch(x=x, dy=dy, weight=weight, grad=grad, bias=bias, bias_grad=bias_grad)
    watch.install(monkeypatch)
    for config in (None, SMALL_STEPS):
        linear.ragged_linear(x, weight, bias, runs, "gelu", True, config=config)
        linear.ragged_dgrad(dy, weight, runs, config=config)
        linear.ragged_wgrad_into(dy, x, runs, grad, True, config=config)
        linear.ragged_bias_grad_into(dy, runs, bias_grad, True)
    assert watch.touched == {"x", "dy", "weight", "grad", "bias", "bias_grad"}


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter counts products")
def test_work_is_that_of_the_staircase(monkeypatch):
    """As many products of blocks as the tiles' first rows need, not what the rectangle has."""
    from triton.runtime.interpreter import InterpreterBuilder

    products, dot = [], InterpreterBuilder.create_dot

    def counted(builder, *args):
        products.append(1)
        return dot(builder, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    runs = [(16, 64, 64), (16, 32, 48), (16, 16, 16), (16, 16, 16)]
    x, dy, block, _ = operands(runs, torch.float32)
    steps = 4 * 4 + 2 * 3 + 1 + 1  # of 16 x 16 x 16
    linear.ragged_linear(x, block, None, runs, "none", False, config=SMALL)
    assert len(products) == steps
    linear.ragged_dgrad(dy, block, runs, config=SMALL)
    assert len(products) == 2 * steps
    linear.ragged_wgrad_into(dy, x, runs, block, True, config=SMALL)
    assert len(products) == 3 * steps


def test_sizes_of_a_shape_seen_before_are_not_made_again():
    device = torch.device(DEVICE)
    runs = ((3, 5, 7), (2, 4, 7), (1, 4, 2))
    sizes = row_sizes.row_sizes(runs, device)
    assert row_sizes.row_sizes(list(runs), device) is sizes
    assert sizes.row_out.tolist() == [5, 5, 5, 4, 4, 4]
    assert sizes.row_in.tolist() == [7, 7, 7, 7, 7, 2]
    assert sizes.out_rows.tolist() == [6, 6, 6, 6, 3]
    assert sizes.in_rows.tolist() == [6, 6, 5, 5, 5, 5, 5]
    assert not sizes.aligned and not sizes.in_aligned and sizes[4:7] == (6, 5, 7)
    assert all(tensor.data_ptr() % 16 == 0 and tensor.dtype == torch.int32 for tensor in sizes[:4])
    norms = row_sizes.row_sizes([(2, 1, 32), (1, 1, 16)], device)
    assert norms.in_aligned and not norms.aligned
    for rows in range(1, 200):
        row_sizes.row_sizes([(rows, 16, 32)], device)
    assert row_sizes._row_sizes.cache_info().currsize <= 64
    assert row_sizes.row_sizes(runs, device) is not sizes
