"""Triton's linear of a few rows, with a split reduction, against float64 in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference import linear as reference  # noqa: E402
from sorted_kernels.triton import decode, linear  # noqa: E402
from sorted_kernels.triton.gemm_config import DECODE_ROWS, decode_config  # noqa: E402
from support.triton_numerics import (  # noqa: E402
    DEVICE,
    DTYPES,
    AddressWatch,
    assert_accurate,
    dtype_id,
    inside,
    poisoned,
    randn,
)

NAN = float("nan")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def splits_of(rows, m, k, dtype=torch.bfloat16, multiprocessors=132):
    if not 0 < rows <= DECODE_ROWS:
        return decode.choose_splits(rows, m, k, torch.empty(0, dtype=dtype))
    return decode._splits(m, k, dtype, multiprocessors)


def run_split(x, weight, bias, m, splits, activation):
    y, z = x.new_full((x.shape[0], m), NAN), x.new_full((x.shape[0], m), NAN)
    decode.linear_split(x, weight, bias, y, z, splits, activation)
    return y, z


@pytest.mark.parametrize(
    ("n", "m", "k", "splits", "activation"),
    [
        (1, 1, 1, 1, "none"),
        (1, 64, 1024, 4, "relu"),
        (16, 70, 515, 3, "gelu"),
        (5, 130, 259, 2, "silu"),
        (3, 33, 640, 5, "none"),
    ],
)
@by_dtype
def test_any_split(dtype, n, m, k, splits, activation):
    x = inside(randn(n, k, dtype=dtype, seed=1), NAN)
    block, bias = randn(m, k, dtype=dtype, seed=2, scale=k**-0.5), randn(m, dtype=dtype, seed=3)
    weight = inside(poisoned(block, m + 3, k + 5), NAN)
    y, z = run_split(x, weight, poisoned(bias, m + 3), m, splits, activation)
    same = reference.linear(x.contiguous(), block, bias, m, "none", False)[0]
    exact = reference.linear(x.double(), block.double(), bias.double(), m, "none", False)[0]
    assert_accurate(z, same, exact)
    assert_accurate(y, reference.activate(same, activation), reference.activate(exact, activation))


@pytest.mark.parametrize(("m", "k"), [(48, 1040), (17, 1027)])
@pytest.mark.parametrize("n", [1, 16, 17])
def test_linear_takes_it_where_rows_are_few(monkeypatch, n, m, k):
    calls = []

    def counted(*args):
        calls.append(args)
        decode_linear(*args)

    decode_linear = decode.linear_split
    monkeypatch.setattr(linear, "linear_split", counted)
    x, weight = (
        randn(n, k, dtype=torch.float32, seed=1),
        randn(60, k + 3, dtype=torch.float32, seed=2),
    )
    weight = weight * k**-0.5
    y, z = linear.linear(x, weight, None, m, "silu", True)
    same, same_z = reference.linear(x, weight, None, m, "silu", True)
    exact, exact_z = reference.linear(x.double(), weight.double(), None, m, "silu", True)
    assert_accurate(y, same, exact)
    assert_accurate(z, same_z, exact_z)
    if DEVICE == "cpu":
        assert len(calls) == (n <= 16)
    _, z = linear.linear(x, weight, None, m, "silu", False)
    assert z.shape == (0,)


def test_splits_are_a_pure_function_of_shape():
    assert splits_of(17, 4096, 4096) == splits_of(0, 4096, 4096) == 1
    assert splits_of(1, 4096, 4096) == 4  # 64 tiles for 132 multiprocessors
    assert splits_of(16, 1024, 4096) == 8  # no part below 512
    assert splits_of(1, 64, 511) == 1
    assert splits_of(1, 20000, 512) == 1  # tiles enough
    assert splits_of(1, 1024, 16384) == 16  # 32 MB
    assert splits_of(1, 1024, 16385) == 1  # above
    assert splits_of(1, 1024, 8193, torch.float32) == 1


def test_view_and_copy_agree_bitwise():
    weight, x = (
        randn(80, 1200, dtype=torch.bfloat16, seed=1),
        randn(4, 1100, dtype=torch.bfloat16, seed=2),
    )
    view, _ = linear.linear(x, weight, None, 70, "none", False)
    copy, _ = linear.linear(x, weight[:70, :1100].contiguous(), None, 70, "none", False)
    assert torch.equal(view, copy)


@by_dtype
def test_decode_tiling_in_every_product(dtype):
    config = decode_config(dtype)
    x, dy = randn(12, 150, dtype=dtype, seed=1), randn(12, 90, dtype=dtype, seed=2, scale=0.3)
    weight = randn(90, 150, dtype=dtype, seed=3, scale=0.1)
    y, _ = linear.linear(x, weight, None, 90, "none", False, config=config)
    assert_accurate(y, x @ weight.T, x.double() @ weight.double().T)
    dx = linear.linear_dgrad(dy, weight, 150, config=config)
    assert_accurate(dx, dy @ weight, dy.double() @ weight.double())
    grad = torch.empty_like(weight)
    linear.linear_wgrad_into(dy, x, grad, False, config=config)
    assert_accurate(grad, dy.T @ x, dy.double().T @ x.double())


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows addresses")
def test_addresses(monkeypatch):
    x, weight, bias = (
        torch.zeros([size + 600 for size in sizes], dtype=torch.float16)[
            tuple(slice(300, 300 + size) for size in sizes)
        ]
        for sizes in ((3, 1027), (65, 1027), (65,))
    )
    watch = AddressWatch(x=x, weight=weight, bias=bias)
    watch.install(monkeypatch)
    run_split(x, weight, bias, 65, 3, "gelu")
    assert watch.touched == {"x", "weight", "bias"}
