"""Triton batch and group norm against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference import batch_norm as batch_reference  # noqa: E402
from sorted_kernels.reference import group_norm as group_reference  # noqa: E402
from sorted_kernels.triton import batch_norm, group_norm  # noqa: E402
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

EPS = 1e-3
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
by_format = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
# Rows and columns on both sides of a tile, one channel, many samples, an aligned size.
FIXED = {
    "one": (1, 1, (2, 1), False),
    "aligned-NCHW": (3, 16, (4, 4), False),
    "aligned-NHWC": (3, 16, (4, 4), True),
    "flat": (40, 20, ()),
    "long-NCHW": (2, 3, (37, 31), False),
    "long-NHWC": (2, 5, (37, 11), True),
    "odd": (2, 17, (7,)),
}


def formatted(x, last):
    return x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x


def values(dtype, n, c, space, last, seed=1):
    """x, dy, weight, bias, running mean and variance."""
    count = max(1, n * torch.Size(space).numel())  # gradients are sums of as many terms
    x = formatted(randn(n, c, *space, dtype=dtype, seed=seed, scale=2) + 3, last)
    dy = formatted(randn(n, c, *space, dtype=dtype, seed=seed + 1, scale=count**-0.5), last)
    affine = [randn(c, dtype=dtype, seed=seed + i) for i in (2, 3)]
    mean, var = randn(c, dtype=dtype, seed=seed + 4), randn(c, dtype=dtype, seed=seed + 5).abs() + 1
    return x, dy, *affine, mean, var


def check_statistics(actual, oracle):
    assert actual.dtype == torch.float32 and actual.shape == oracle.shape
    torch.testing.assert_close(actual.double(), oracle, rtol=5e-6, atol=2e-6)


def check_gradients(dtype, c, accumulate, backward, plain, oracle):
    """Each ``backward(weight_out, bias_out, add_weight, add_bias)``; gradients in patterns."""
    grads = [Patterned((c + 5,), (c,), dtype) for _ in range(2)]
    same = [grad.start.clone() for grad in grads]
    exact = [grad.start.double() for grad in grads]
    dx = backward(grads[0].view, grads[1].view, *accumulate)
    same_dx, exact_dx = plain(*same, *accumulate), oracle(*exact, *accumulate)
    assert dx.stride() == same_dx.stride()
    assert_accurate(dx, same_dx, exact_dx)
    for grad, same_grad, exact_grad in zip(grads, same, exact, strict=True):
        assert_accurate(grad.view, same_grad, exact_grad)
        grad.assert_rest_intact()


def check_batch_norm(dtype, n, c, space, last, training, accumulate=(True, True)):
    if training and n * torch.Size(space).numel() == 1:
        return
    x, dy, weight, bias, mean, var = values(dtype, n, c, space, last)
    wide = [value.double() for value in (x, weight, bias, mean, var)]
    parents = [poisoned(value, c + 5) for value in (weight, bias)]
    running = [Patterned((c + 3,), (c,), dtype) for _ in range(2)]
    for statistic, value in zip(running, (mean, var), strict=True):
        statistic.view.copy_(value)
    options = (training, 0.3, EPS)
    y, found, rstd = batch_norm.batch_norm(x, *parents, *(r.full for r in running), *options)
    same, *same_statistics = batch_reference.batch_norm(x, weight, bias, mean, var, *options)
    oracle, mean64, rstd64 = batch_reference.batch_norm(*wide, *options)
    assert y.stride() == same.stride() and y.dtype == dtype
    assert_accurate(y, same, oracle)
    check_statistics(found, mean64)
    check_statistics(rstd, rstd64)
    for statistic, plain, exact in zip(running, (mean, var), wide[3:], strict=True):
        assert_accurate(statistic.view, plain, exact)
        statistic.assert_rest_intact()

    def backward(module, dy, x, statistics, weight):
        return lambda *outs: module.batch_norm_backward_into(
            dy, x, *statistics, weight, training, *outs
        )

    check_gradients(
        dtype, c, accumulate,
        backward(batch_norm, dy, x, (found, rstd), parents[0]),
        backward(batch_reference, dy, x, same_statistics, weight),
        backward(batch_reference, dy.double(), wide[0], (mean64, rstd64), weight.double()),
    )  # fmt: skip


def check_group_norm(dtype, n, c, space, last, groups, accumulate=(True, True)):
    x, dy, weight, bias, *_ = values(dtype, n, c, space, last)
    if x.numel() // groups <= n:
        return
    parents = [poisoned(value, c + 5) for value in (weight, bias)]
    y, mean, rstd = group_norm.group_norm(x, *parents, groups, EPS)
    same, *same_statistics = group_reference.group_norm(x, weight, bias, groups, EPS)
    wide = [value.double() for value in (x, weight, bias)]
    oracle, mean64, rstd64 = group_reference.group_norm(*wide, groups, EPS)
    assert y.stride() == same.stride()
    assert_accurate(y, same, oracle)
    check_statistics(mean, mean64)
    check_statistics(rstd, rstd64)

    def backward(module, dy, x, statistics, weight):
        return lambda *outs: module.group_norm_backward_into(
            dy, x, *statistics, weight, groups, *outs
        )

    check_gradients(
        dtype, c, accumulate,
        backward(group_norm, dy, x, (mean, rstd), parents[0]),
        backward(group_reference, dy, x, same_statistics, weight),
        backward(group_reference, dy.double(), wide[0], (mean64, rstd64), weight.double()),
    )  # fmt: skip


def groups_of(c, wish):
    return max(g for g in range(1, c + 1) if c % g == 0 and g <= wish)


spaces = st.one_of(st.just(()), st.tuples(st.integers(1, 40)), st.tuples(*[st.integers(1, 9)] * 2))
anything = given(
    n=st.integers(1, 9), c=st.integers(1, 20), space=spaces, last=st.booleans(),
    add=st.tuples(st.booleans(), st.booleans()), wish=st.integers(1, 40),
)  # fmt: skip
few = settings(max_examples=4, deadline=None, derandomize=True, phases=(Phase.generate,))


@by_dtype
@few
@anything
def test_batch_norm_any_size(dtype, n, c, space, last, add, wish):
    check_batch_norm(dtype, n, c, space, last, wish % 3 > 0, add)


@by_dtype
@few
@anything
def test_group_norm_any_size(dtype, n, c, space, last, add, wish):
    check_group_norm(dtype, n, c, space, last, groups_of(c, wish), add)


@by_dtype
@pytest.mark.parametrize("size", FIXED)
def test_fixed_sizes(dtype, size):
    n, c, space, *last = FIXED[size]
    check_batch_norm(dtype, n, c, space, last == [True], True)
    check_batch_norm(dtype, n, c, space, last == [True], False)
    check_group_norm(dtype, n, c, space, last == [True], c)
    check_group_norm(dtype, n, c, space, last == [True], groups_of(c, 3))


@by_format
def test_inputs_cut_out_of_larger_buffers(last):
    x, dy, weight, bias, *_ = values(torch.float32, 3, 6, (4, 5), False)
    cut, cut_dy = inside(x, float("nan")), inside(dy, float("nan"))
    if last:
        cut, cut_dy = (t.movedim(-1, 1).movedim(1, -1) for t in (cut, cut_dy))
    for run in (
        lambda x: batch_norm.batch_norm(x, weight, bias, None, None, True, 0.1, EPS),
        lambda x: group_norm.group_norm(x, weight, bias, 3, EPS),
    ):
        for ours, right in zip(run(cut), run(x), strict=True):
            assert torch.equal(ours, right)
    statistics = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    one, other = (
        batch_norm.batch_norm_backward_into(
            g, v, *statistics, weight, True, None, None, False, False
        )
        for g, v in ((cut_dy, cut), (dy, x))
    )
    assert torch.equal(one, other)


@by_format
def test_each_gradient_alone(last):
    x, dy, weight, _, mean, var = values(torch.float32, 4, 6, (3, 5), last)
    for module, reference, name, extra in (
        (batch_norm, batch_reference, "batch_norm", True),
        (batch_norm, batch_reference, "batch_norm", False),
        (group_norm, group_reference, "group_norm", 2),
    ):
        statistics = mean, var.rsqrt()
        if name == "group_norm":
            statistics = randn(8, dtype=x.dtype, seed=7), randn(8, dtype=x.dtype, seed=8).abs()
        for need_dx, *has in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)]:
            outs = [torch.full((6,), 7.0, device=DEVICE) if one else None for one in has]
            expected = [None if out is None else out.clone() for out in outs]
            results = []
            for each, given_outs in ((module, outs), (reference, expected)):
                into = getattr(each, f"{name}_backward_into")
                args = (dy, x, *statistics, weight, extra, *given_outs, False, False)
                results.append([into(*args, bool(need_dx)), *given_outs])
            assert (results[0][0] is not None) == bool(need_dx)
            for ours, theirs in zip(*results, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_large_mean_does_not_spoil_the_variance():
    x = randn(50, 3, 8, dtype=torch.float32, seed=1) * 1e-2 + 100
    _, mean, rstd = batch_norm.batch_norm(x, None, None, None, None, True, 0.1, 1e-9)
    wide = x.double().transpose(0, 1).flatten(1)
    exact = (wide.var(1, correction=0) + 1e-9).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.double(), wide.mean(1), rtol=1e-6, atol=0)


def test_no_samples_and_no_affine_parameters():
    empty, one = torch.empty(0, 3, 2, device=DEVICE), torch.ones(4, device=DEVICE)
    y, *statistics = group_norm.group_norm(empty, one, one, 3, EPS)
    assert y.shape == empty.shape
    y, mean, rstd = batch_norm.batch_norm(empty, one, one, one, one, False, 0.1, EPS)
    assert y.shape == empty.shape and mean.shape == (3,)
    x, dy, *_ = values(torch.float32, 3, 4, (5,), False)
    y, mean, rstd = batch_norm.batch_norm(x, None, None, None, None, True, 0.1, EPS)
    exact, *wide = batch_reference.batch_norm(x.double(), None, None, None, None, True, 0.1, EPS)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    none = (None, True, None, None, False, False)
    dx = batch_norm.batch_norm_backward_into(dy, x, mean, rstd, *none)
    exact = batch_reference.batch_norm_backward_into(dy.double(), x.double(), *wide, *none)
    torch.testing.assert_close(dx.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows addresses")
@pytest.mark.parametrize(("n", "c", "space"), [(1, 1, 2), (3, 17, 5), (3, 2, 50)])
@pytest.mark.parametrize("name", ["batch_norm", "group_norm"])
def test_addresses(monkeypatch, name, n, c, space):
    """Nothing outside x, and nothing past c in any parameter or gradient, is touched."""

    def vector(size):
        return torch.ones(size + 600)[300 : 300 + size]

    views = {k: vector(n * c * space).view(n, c, space) for k in ("x", "dy")}
    views |= {k: vector(c) for k in ("weight", "bias", "weight_grad", "bias_grad", "mean", "var")}
    if name == "group_norm":
        del views["mean"], views["var"]
    watch = AddressWatch(**views)
    watch.install(monkeypatch)
    module, extra = (batch_norm, True) if name == "batch_norm" else (group_norm, c)
    x, weight, bias = views["x"], views["weight"], views["bias"]
    if name == "batch_norm":
        args = (x, weight, bias, views["mean"], views["var"], True, 0.1, EPS)
        _, *statistics = batch_norm.batch_norm(*args)
    else:
        _, *statistics = group_norm.group_norm(x, weight, bias, c, EPS)
    into = getattr(module, f"{name}_backward_into")
    outs = views["weight_grad"], views["bias_grad"], True, True
    into(views["dy"], x, *statistics, weight, extra, *outs)
    assert watch.touched >= set(views) - ({"weight"} if name == "group_norm" else set())
