"""Triton's linear of a few rows, with a split reduction, against float64 in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference import linear as reference  # noqa: E402
from sorted_kernels.triton import decode, linear  # noqa: E402
from sorted_kernels.triton import ragged_linear as ragged_module  # noqa: E402
from sorted_kernels.triton.gemm_config import DECODE_ROWS, decode_config  # noqa: E402
from support import ragged  # noqa: E402
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
    decode.split_product(x, weight, y, splits, bias=bias, z=z, activation=activation)
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

    def counted(*args, **options):
        calls.append(args)
        decode.split_product(*args, **options)

    monkeypatch.setattr(linear, "split_product", counted)
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


SPLITS = [(1, 64, 1024, 4), (16, 70, 515, 3), (5, 130, 259, 2), (3, 33, 640, 5), (1, 1, 1, 1)]


@pytest.mark.parametrize(("n", "k", "m", "splits"), SPLITS)
@by_dtype
def test_any_split_of_dgrad(dtype, n, k, m, splits):
    dy = inside(randn(n, m, dtype=dtype, seed=1), NAN)
    block = randn(m, k, dtype=dtype, seed=2, scale=m**-0.5)
    weight, dx = inside(poisoned(block, m + 3, k + 5), NAN), dy.new_full((n, k), NAN)
    decode.split_product(dy, weight, dx, splits, transposed=False)
    assert_accurate(dx, dy.contiguous() @ block, dy.double() @ block.double())


FEW = {
    "odd": (5, [(2, 70, 515), (5, 33, 515), (1, 33, 300), (3, 2, 1)]),
    "aligned": (2, [(4, 96, 512), (3, 96, 128), (9, 16, 16)]),
    "one": (3, [(1, 40, 700)]),
    "deep": (2, [(1, 40, 1100), (15, 1, 1)]),
}


@pytest.mark.parametrize("problem", FEW.values(), ids=FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_few_rows_of_a_ragged_batch(monkeypatch, dtype, problem):
    """Forward and dgrad, NaN past each row's sizes; zero there in what is returned."""
    splits, runs = problem
    n, m, k = ragged.largest(runs)
    x, dy = randn(n, k + 2, dtype=dtype, seed=1), randn(n, m + 1, dtype=dtype, seed=2)
    block, bias = randn(m, k, dtype=dtype, seed=3, scale=k**-0.5), randn(m, dtype=dtype, seed=4)
    x = inside(ragged.fill_past(x, runs, NAN, features="in"), NAN)
    dy = inside(ragged.fill_past(dy, runs, NAN, features="out"), NAN)
    weight = inside(poisoned(block, m + 3, k + 5), NAN)
    calls = []

    def counted(*args, **options):
        calls.append(args)
        decode.split_product(*args, **options)

    monkeypatch.setattr(ragged_module, "split_product", counted)
    monkeypatch.setattr(ragged_module, "choose_splits", lambda *shape: splits)
    y, z = linear.ragged_linear(x, weight, poisoned(bias, m + 3), runs, "gelu", True)
    dx = linear.ragged_dgrad(dy, weight, runs)
    assert len(calls) == 2
    same = ragged.ragged_linear(x, block, bias, runs)
    exact = ragged.ragged_linear(x.double(), block.double(), bias.double(), runs)
    assert_accurate(z, same, exact)
    assert_accurate(y, reference.activate(same, "gelu"), reference.activate(exact, "gelu"))
    same = ragged.ragged_dgrad(dy, block, runs)
    assert_accurate(dx, same, ragged.ragged_dgrad(dy.double(), block.double(), runs))
    for rows, out_features, in_features in ragged.spans(runs):
        assert not y[rows, out_features:].any() and not dx[rows, in_features:].any()


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_who_takes_the_split(monkeypatch, rows):
    """By the reduction of the product: forward has k, dgrad m, uniform or ragged."""
    asked = []

    def count(module):
        def chosen(*shape):
            splits = decode.choose_splits(*shape)
            asked.append((module, shape[1:3], splits))
            return splits

        return chosen

    monkeypatch.setattr(linear, "choose_splits", count("uniform"))
    monkeypatch.setattr(ragged_module, "choose_splits", count("ragged"))
    x, dy = (randn(rows, size, dtype=torch.float32, seed=1) for size in (1024, 48))
    weight = randn(48, 1024, dtype=torch.float32, seed=2)
    linear.linear(x, weight, None, 48, "none", False)
    linear.linear_dgrad(dy, weight, 1024)
    linear.ragged_linear(x, weight, None, [(rows, 48, 1024)], "none", False)
    linear.ragged_dgrad(dy, weight, [(rows, 48, 1024)])
    linear.linear_dgrad(x, weight.T.contiguous(), 48)
    few = DEVICE == "cpu" and rows <= 16
    assert [(module, shape) for module, shape, _ in asked] == [
        ("uniform", (48, 1024)), ("uniform", (1024, 48)), ("ragged", (48, 1024)),
        ("ragged", (1024, 48)), ("uniform", (48, 1024)),
    ]  # fmt: skip
    if DEVICE == "cpu":
        assert [splits for *_, splits in asked] == ([2, 1, 2, 1, 2] if few else [1] * 5)


def test_parts_cover_the_reduction_once():
    """Every element in one part, none of them empty, and no more parts than asked for."""
    for reduction in (1, 15, 16, 17, 512, 1027, 4096, 12345):
        for splits in (1, 2, 3, 7, 16):
            for block_k in (16, 32, 128):
                steps, parts = decode.split_steps(reduction, splits, block_k)
                ends = [min(part * steps * block_k, reduction) for part in range(parts + 1)]
                assert ends[0] == 0 and ends[-1] == reduction and parts <= splits
                assert all(begin < end for begin, end in zip(ends, ends[1:], strict=False))


def test_results_do_not_depend_on_timing():
    """A part's place in the sum is its own: the same bits each time."""
    runs = [(2, 33, 1100), (3, 20, 700)]
    x, weight = (randn(*s, dtype=torch.bfloat16, seed=1) for s in ((5, 1100), (33, 1100)))
    first, _ = linear.ragged_linear(x, weight, None, runs, "none", False)
    for _ in range(20 if DEVICE == "cuda" else 1):
        again, _ = linear.ragged_linear(x, weight, None, runs, "none", False)
        assert torch.equal(again, first)


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
    x, weight, bias, dy = (
        torch.zeros([size + 600 for size in sizes], dtype=torch.float16)[
            tuple(slice(300, 300 + size) for size in sizes)
        ]
        for sizes in ((3, 1027), (65, 1027), (65,), (3, 65))
    )
    watch = AddressWatch(x=x, weight=weight, bias=bias, dy=dy)
    watch.install(monkeypatch)
    run_split(x, weight, bias, 65, 3, "gelu")
    assert watch.touched == {"x", "weight", "bias"}
    decode.split_product(dy, weight, torch.empty(3, 1027, dtype=dy.dtype), 2, transposed=False)
    assert watch.touched == {"x", "weight", "bias", "dy"}
