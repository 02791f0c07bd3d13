"""Triton linear: forward, dgrad, wgrad and bias gradient against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference import linear as reference  # noqa: E402
from sorted_kernels.triton import linear  # noqa: E402
from sorted_kernels.triton.gemm_config import (  # noqa: E402
    FLOAT_CONFIGS,
    HALF_CONFIGS,
    GemmConfig,
    choose_config,
    config_supports,
    decode_config,
)
from sorted_kernels.triton.launch import DeviceLimits  # noqa: E402
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

M, K = 210, 230
sizes = st.integers(1, 70)
FIXED = [(1, 1, 1), (64, 64, 64), (130, 144, 80), (70, M, K), (33, 17, 129)]
CASES = [
    pytest.param(dtype, config, id=f"{dtype_id(dtype)}-{config.block_m}x{config.block_n}")
    for dtype in DTYPES
    for config in (FLOAT_CONFIGS if dtype == torch.float32 else HALF_CONFIGS)
]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def check_forward(dtype, n, m, k, activation, config=None):
    x = inside(randn(n, k, dtype=dtype, seed=1), float("nan"))
    block = randn(m, k, dtype=dtype, seed=2, scale=k**-0.5)
    bias = randn(m, dtype=dtype, seed=3)
    weight = poisoned(block, M, K)
    y, z = linear.linear(x, weight, poisoned(bias, M), m, activation, True, config=config)
    # Dense operands for PyTorch: its bfloat16 kernel for CPUs with AMX reads past a row's end.
    same, same_z = reference.linear(x.contiguous(), block, bias, m, activation, True)
    oracle, oracle_z = reference.linear(
        x.double(), block.double(), bias.double(), m, activation, True
    )
    assert y.dtype == dtype and y.is_contiguous()
    assert_accurate(y, same, oracle)
    assert_accurate(z, same_z, oracle_z)


def check_backward(dtype, n, m, k, accumulate, config=None):
    x = inside(randn(n, k, dtype=dtype, seed=1), float("nan"))
    dy = inside(randn(n, m, dtype=dtype, seed=2, scale=n**-0.5), float("nan"))
    block = randn(m, k, dtype=dtype, seed=3, scale=m**-0.5)
    dx = linear.linear_dgrad(dy, poisoned(block, M, K), k, config=config)
    dense_x, dense_dy = x.contiguous(), dy.contiguous()
    assert_accurate(dx, dense_dy @ block, dy.double() @ block.double())

    grad, bias_grad = Patterned((M, K), (m, k), dtype), Patterned((M,), (m,), dtype)
    same, same_bias = grad.start.clone(), bias_grad.start.clone()
    oracle = dy.double().T @ x.double() + accumulate * grad.start.double()
    oracle_bias = dy.double().sum(0) + accumulate * bias_grad.start.double()
    linear.linear_wgrad_into(dy, x, grad.view, accumulate, config=config)
    linear.bias_grad_into(dy, bias_grad.view, accumulate)
    reference.linear_wgrad_into(dense_dy, dense_x, same, accumulate)
    reference.bias_grad_into(dense_dy, same_bias, accumulate)
    assert_accurate(grad.view, same, oracle)
    assert_accurate(bias_grad.view, same_bias, oracle_bias)
    grad.assert_rest_intact()
    bias_grad.assert_rest_intact()


@by_dtype
@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=sizes, m=sizes, k=sizes, activation=st.sampled_from(reference.ACTIVATIONS))
def test_forward_any_size(dtype, n, m, k, activation):
    check_forward(dtype, n, m, k, activation)


@by_dtype
@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=sizes, m=sizes, k=sizes, accumulate=st.booleans())
def test_backward_any_size(dtype, n, m, k, accumulate):
    check_backward(dtype, n, m, k, accumulate)


@pytest.mark.parametrize(("dtype", "config"), CASES)
def test_every_tiling(dtype, config):
    for n, m, k in FIXED:
        check_forward(dtype, n, m, k, "gelu", config)
        check_backward(dtype, n, m, k, True, config)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@by_dtype
def test_every_activation_with_and_without_saving(dtype, activation):
    check_forward(dtype, 20, 48, 32, activation)
    x, weight = randn(20, 32, dtype=dtype, seed=1), randn(M, K, dtype=dtype, seed=2)
    _, z = linear.linear(x, weight, None, 48, activation, False)
    assert z.shape == (0,)


def test_activation_keeps_nan():
    x = torch.tensor([[float("nan")], [1.0]], device=DEVICE)
    for activation in reference.ACTIVATIONS:
        y, _ = linear.linear(x, torch.ones(1, 1, device=DEVICE), None, 1, activation, False)
        assert torch.isnan(y).tolist() == [[True], [False]]


@pytest.mark.parametrize(("dtype", "config"), CASES)
@pytest.mark.parametrize(("m", "k"), [(80, 64), (33, 65)], ids=["aligned", "odd"])
def test_prefix_view_and_copy_agree_bitwise(dtype, config, m, k):
    weight = randn(M, K, dtype=dtype, seed=1)
    x, dy = randn(40, k, dtype=dtype, seed=2), randn(40, m, dtype=dtype, seed=3)
    copy = weight[:m, :k].contiguous()
    view_y, _ = linear.linear(x, weight, None, m, "silu", False, config=config)
    copy_y, _ = linear.linear(x, copy, None, m, "silu", False, config=config)
    assert torch.equal(view_y, copy_y)
    view_dx = linear.linear_dgrad(dy, weight, k, config=config)
    assert torch.equal(view_dx, linear.linear_dgrad(dy, copy, k, config=config))
    linear.linear_wgrad_into(dy, x, weight[:m, :k], True, config=config)
    linear.linear_wgrad_into(dy, x, copy, True, config=config)
    assert torch.equal(weight[:m, :k], copy)


def test_leading_axes_and_expanded_gradient():
    x = randn(3, 5, 24, dtype=torch.float32, seed=1)
    weight = randn(M, K, dtype=torch.float32, seed=2)
    y, _ = linear.linear(x, weight, None, 40, "none", False)
    oracle = x.double() @ weight[:40, :24].double().T
    assert_accurate(y, x @ weight[:40, :24].T, oracle)
    ones = torch.ones((), device=DEVICE).expand(3, 5, 40)  # the gradient of y.sum()
    dx = linear.linear_dgrad(ones, weight, 24)
    assert_accurate(dx, ones @ weight[:40, :24], ones.double() @ weight[:40, :24].double())


def test_no_rows():
    x, weight = torch.empty(0, 24, device=DEVICE), randn(M, K, dtype=torch.float32, seed=1)
    y, z = linear.linear(x, weight, weight[0], 40, "gelu", True)
    assert y.shape == z.shape == (0, 40)
    assert linear.linear_dgrad(y, weight, 24).shape == (0, 24)
    grad, bias_grad = Patterned((M, K), (40, 24), x.dtype), Patterned((M,), (40,), x.dtype)
    for accumulate in (True, False):
        linear.linear_wgrad_into(y, x, grad.view, accumulate)
        linear.bias_grad_into(y, bias_grad.view, accumulate)
        for buffer in (grad, bias_grad):
            buffer.assert_rest_intact()
            expected = buffer.start if accumulate else torch.zeros_like(buffer.start)
            assert torch.equal(buffer.view, expected)


def test_float32_gradient_of_bfloat16_operands():
    dy, x = randn(60, 33, dtype=torch.bfloat16, seed=1), randn(60, 47, dtype=torch.bfloat16, seed=2)
    grad = Patterned((M, K), (33, 47), torch.float32)
    linear.linear_wgrad_into(dy, x, grad.view, True)
    oracle = grad.start.double() + dy.double().T @ x.double()
    assert_accurate(grad.view, grad.start + dy.float().T @ x.float(), oracle)
    grad.assert_rest_intact()


def test_bias_gradient_of_many_rows_takes_two_stages():
    dy = randn(3000, 70, dtype=torch.float32, seed=1, scale=0.02)
    grad = Patterned((M,), (70,), torch.float32)
    linear.bias_grad_into(dy, grad.view, True)
    oracle = grad.start.double() + dy.double().sum(0)
    assert_accurate(grad.view, grad.start + dy.sum(0), oracle)
    grad.assert_rest_intact()


SMALL = DeviceLimits(multiprocessors=84, shared_memory=99 * 1024)
HOPPER = DeviceLimits(multiprocessors=132, shared_memory=227 * 1024, large_tiles=True)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("limits", [SMALL, HOPPER], ids=["sm_86", "sm_90"])
@by_dtype
def test_chosen_tiling_is_supported(dtype, limits, aligned):
    for rows in (1, 100, 4096, 100_000):
        for cols in (1, 100, 4096):
            config = choose_config(rows, cols, dtype, limits, aligned)
            assert config_supports(config, dtype, limits, aligned)


def test_large_shapes_get_large_tiles_and_small_ones_fill_the_gpu():
    def chosen(rows, cols, aligned=True):
        return choose_config(rows, cols, torch.bfloat16, HOPPER, aligned)

    assert (chosen(8192, 8192).block_m, chosen(8192, 8192).block_n) == (128, 256)
    assert chosen(8191, 8191, aligned=False).block_n == 128
    assert chosen(64, 4096).block_n == 32
    assert chosen(16, 4096) == decode_config(torch.bfloat16)


def test_unsupported_tilings():
    assert not config_supports(GemmConfig(48, 64, 64, 4, 2), torch.bfloat16, HOPPER, True)
    assert not config_supports(GemmConfig(128, 128, 64, 8, 8), torch.bfloat16, HOPPER, True)
    assert not config_supports(HALF_CONFIGS[0], torch.bfloat16, HOPPER, aligned=False)
