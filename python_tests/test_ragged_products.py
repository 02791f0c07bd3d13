"""Compiled ragged products on the CPU: how they are cut, and their results against float64."""

import random

import numpy as np
import pytest
import torch

from sorted_kernels.ops import backend, ragged_linear, ragged_products
from sorted_kernels.ops.library import load_compiled
from sorted_kernels.reference import ragged as reference
from sorted_kernels.reference.linear import activate
from support import ragged
from support.poison import assert_same_bits, in_larger_buffer, pattern, poisoned
from support.triton_numerics import assert_accurate

needs_library = pytest.mark.skipif(not load_compiled(), reason="the compiled library is absent")
MODES = ("forward", "dgrad", "wgrad")
# Enough work for several jobs; a hundred runs of one row; jobs' ends within runs; one element.
LARGE = {
    "even": [(24, 640 - 64 * i, 640 - 64 * i) for i in range(10)],
    "many": [(1, 700 - 7 * i, 705 - 5 * i) for i in range(100)],
    "odd": [(130, 411, 1025), (1, 411, 1000), (77, 333, 999), (200, 331, 7), (3, 1, 1)],
    "uniform": [(300, 513, 511)],
    "one": [(1, 1, 1)],
}


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def large_problems(count):
    yield from LARGE.values()
    for seed in range(count):
        runs = next(ragged.random_problems(seed, 1, limit=random.Random(seed).choice([9, 90, 700])))
        yield [(7 * rows, m, k) for rows, m, k in runs] if seed % 2 else runs


@pytest.mark.parametrize("mode", MODES)
def test_boxes_cover_the_work_once(mode):
    """... and each output belongs to one job."""
    host = pytest.importorskip("sorted_kernels._host", reason="the planning code was not compiled")
    most = 0
    for runs in large_problems(60):
        rows, m, k = ragged.largest(runs)
        users = np.zeros((m, k), int)
        for count, out_features, in_features in runs:
            users[:out_features, :in_features] += count
        for threads in (1, 2, 5):
            jobs = host.ragged_jobs(mode, runs, threads)
            most = max(most, len(jobs))
            assert len(jobs) <= (1 if threads == 1 else 3 * threads)
            ends = [end for _, end, _ in jobs]
            assert [begin for begin, _, _ in jobs] == [0, *ends[:-1]]
            assert ends[-1] == (k if mode == "dgrad" else m)
            covered, used = np.zeros((m, k), int), np.zeros((m, k), int)
            for begin, end, boxes in jobs:
                for box_rows, m0, m1, k0, k1 in boxes:
                    outputs = (k0, k1) if mode == "dgrad" else (m0, m1)
                    assert begin <= outputs[0] < outputs[1] <= end
                    covered[m0:m1, k0:k1] += 1
                    used[m0:m1, k0:k1] = box_rows
            assert covered.max() == 1 and np.array_equal(used, users)
    assert most == 15


def test_what_is_no_ragged_batch_is_refused():
    host = pytest.importorskip("sorted_kernels._host", reason="the planning code was not compiled")
    for runs in ([], [(0, 1, 1)], [(1, 0, 1)], [(1, 2, 2), (1, 3, 1)], [(1, 2, 2), (1, 1, 3)]):
        with pytest.raises(ValueError, match="runs"):
            host.ragged_jobs("forward", runs, 1)


def operands(runs):
    """x, dy, weight and bias: parents larger than the batch, NaN past what may be read."""
    n, m, k = ragged.largest(runs)
    x, dy = torch.randn(n, k + 2), torch.randn(n, m + 1) * n**-0.5
    ragged.fill_past(x, runs, torch.nan, features="in")
    ragged.fill_past(dy, runs, torch.nan, features="out")
    block, bias = torch.randn(m, k) * k**-0.5, poisoned(torch.randn(m), (m + 3,))
    return in_larger_buffer(x), in_larger_buffer(dy), poisoned(block, (m + 3, k + 5)), bias


def at_full_size(kind, runs, x, dy, block, bias, begun):
    """Forward, dgrad and wgrad by PyTorch: zeros past each row's sizes, all rows at full size."""
    n, m, k = ragged.largest(runs)
    x, dy = x[:, :k].to(kind, copy=True), dy[:, :m].to(kind, copy=True)
    y = torch.ones(n, m, dtype=kind)
    for rows, features in ((x, "in"), (dy, "out"), (y, "out")):
        ragged.fill_past(rows, runs, 0, features=features)
    block = block.to(kind)
    z = x @ block.T if bias is None else torch.addmm(bias.to(kind), x, block.T)
    dx = ragged.fill_past(dy @ block, runs, 0, features="in")
    return z * y, dx, torch.addmm(begun.to(kind), dy.T, x)


def by_prefixes(runs, x, dy, block, bias, begun):
    """The same, prefix by prefix: a gradient's block takes all rows that use the whole of it."""
    grad = begun.clone()
    for part, m, k in ragged.spans(runs):
        grad[:m, :k] = begun[:m, :k] + dy[: part.stop, :m].T @ x[: part.stop, :k]
    y = ragged.ragged_linear(x, block, bias, runs)
    return y, ragged.ragged_dgrad(dy, block, runs), grad


def less_accurate(exact, *results):
    """Of two ways to ask PyTorch, the one that is allowed the larger error."""
    return max(results, key=lambda result: (result.double() - exact).abs().max().item())


def check(module, runs, activation, accumulate):
    """All products of one batch against float64; twice, with the same bits."""
    n, m, k = ragged.largest(runs)
    x, dy, weight, bias = operands(runs)
    block, bias = weight[:m, :k], bias[:m] if accumulate else None
    grad = pattern((m + 3, k + 5), torch.float32) / 8
    begun = grad[:m, :k].clone() if accumulate else grad.new_zeros(m, k)
    untouched = grad.clone()
    if not accumulate:
        grad[:m, :k] = torch.nan
    again = grad.clone()

    def run(grad):
        y, z = module.ragged_linear(x, weight, bias, runs, activation, True)
        module.ragged_wgrad_into(dy, x, runs, grad, accumulate)
        return y, z, module.ragged_dgrad(dy, weight, runs)

    y, z, dx = run(grad)
    arguments = (runs, x, dy, block, bias, begun)
    exact, stock = (at_full_size(kind, *arguments) for kind in (torch.float64, torch.float32))
    same = list(map(less_accurate, exact, stock, by_prefixes(*arguments)))
    assert_accurate(y, *(activate(found[0], activation) for found in (same, exact)))
    if activation in ("gelu", "silu"):
        assert_accurate(z, same[0], exact[0])
    assert_accurate(dx, same[1], exact[1])
    assert_accurate(grad[:m, :k], same[2], exact[2])
    for part, out, in_ in ragged.spans(runs):
        assert not y[part, out:].any() and not dx[part, in_:].any()

    untouched[:m, :k] = grad[:m, :k]
    assert_same_bits(grad, untouched)
    for before, after in zip((y, z, dx), run(again), strict=True):
        assert_same_bits(after, before)
    assert_same_bits(again, grad)


@needs_library
@pytest.mark.parametrize("runs", LARGE.values(), ids=LARGE)
def test_large_batches(runs, threads):
    check(ragged_products, runs, "gelu" if threads == 2 else "none", threads != 3)


@pytest.mark.parametrize(
    "module", [pytest.param(ragged_products, marks=needs_library), reference], ids=["cut", "plain"]
)
def test_random_problems(module, ragged_runs):
    rows = ragged.largest(ragged_runs)[0]
    check(module, ragged_runs, ("none", "relu", "gelu", "silu")[rows % 4], rows % 3 == 0)


@needs_library
def test_reductions_are_as_long_as_the_rows():
    """x and dy of the smallest rows hold NaN where only larger rows are read."""
    runs = [(1, 2048, 2048), (40, 1, 1)]
    check(ragged_products, runs, "none", True)


@needs_library
def test_expanded_rows():
    """Rows that share memory, as an expanded gradient's do."""
    runs = [(3, 5, 4), (2, 2, 4)]
    x, weight = torch.randn(1, 4).expand(5, 4), torch.randn(5, 4)
    y, _ = ragged_products.ragged_linear(x, weight, None, runs, "none", False)
    torch.testing.assert_close(y, ragged.ragged_linear(x, weight, None, runs))
    dx = ragged_products.ragged_dgrad(torch.ones(1, 5).expand(5, 5), weight, runs)
    torch.testing.assert_close(dx, ragged.ragged_dgrad(torch.ones(5, 5), weight, runs))


@needs_library
@pytest.mark.parametrize(
    ("product", "a", "b", "out", "runs", "message"),
    [
        (0, (4, 4), (5, 4), (4, 5), [2, 5, 4, 2, 6, 4], "sizes do not rise"),
        (0, (4, 4), (5, 4), (4, 5), [2, 5], "triples"),
        (3, (4, 4), (5, 4), (4, 5), [4, 5, 4], "mode"),
        (0, (3, 4), (5, 4), (4, 5), [4, 5, 4], "a must have at least 4 rows"),
        (0, (4, 4), (5, 3), (4, 5), [4, 5, 4], "b must have at least 5 rows and 4 columns"),
        (1, (4, 5), (5, 4), (4, 3), [4, 5, 4], "out must have at least 4 rows and 4"),
        (2, (4, 5), (4, 4), (4, 4), [4, 5, 4], "out must have at least 5 rows"),
    ],
)
def test_nothing_is_written_where_shapes_do_not_fit(product, a, b, out, runs, message):
    out = torch.zeros(out)
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.sorted_kernels.ragged_product_(
            product, torch.ones(a), torch.ones(b), None, runs, out, False
        )
    assert not out.any()


@pytest.mark.parametrize("setting", ["", "reference"])
def test_what_runs_them(monkeypatch, setting):
    monkeypatch.setenv("SORTED_KERNELS_BACKEND", setting)
    backend.reset()
    compiled = ragged_products if load_compiled() and not setting else reference

    def found(dtype=torch.float32):
        one = torch.ones(1, 1, dtype=dtype)
        return ragged_linear._backend("forward", (one, one), [1, 1, 1])

    try:
        assert found() is compiled
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert found(dtype) is reference
        with backend.reference_only():
            assert found() is reference
    finally:
        monkeypatch.undo()
        backend.reset()
