"""The public ops on the compiled GEMM: what reaches it, and that all is as in float64.

On a machine without a GPU, CPU tensors and emulated threads stand in.
"""

import functools
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sorted_kernels as sk
from sorted_kernels.ops import backend
from support import emulated_gemm, oracle
from support.gemm import random_runs
from support.oracle import assert_outcome, assert_within_twice
from support.poison import (
    assert_same_bits,
    in_larger_buffer,
    outside,
    pattern,
    poisoned,
    transposed,
)
from support.ragged import (
    fill_past,
    ragged_bias_grad,
    ragged_dgrad,
    ragged_linear,
    ragged_wgrad,
    spans,
)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {
    "odd": (13, 37, 51),
    "one": (1, 1, 1),
    "full": (20, 48, 72),
    "decode": (3, 41, 72),
}  # rows, m, k
FULL = (48, 72)


@pytest.fixture
def hopper(device, monkeypatch):
    """The device; ops dispatch as on an sm_90 GPU whose only kernel of ours is the compiled one."""
    yield emulated_gemm.hopper(device, monkeypatch)
    monkeypatch.undo()
    backend.reset()


@pytest.fixture
def calls(hopper, monkeypatch):
    """The compiled GEMM's calls: mode, number of runs, the output's dtype."""
    return emulated_gemm.dispatched(hopper, monkeypatch, forced="cuda")


def family(activation):
    return next(each for each in oracle.LINEAR if each.name == f"linear-{activation}")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_forward_and_gradients(hopper, calls, dtype, size, activation):
    dtype, (rows, m, k), op = HALF[dtype], SIZES[size], family(activation)
    x, blocks = op.input((rows, k), m, dtype), op.parameters(m, k, dtype)
    parents = {n: poisoned(b, FULL[: b.dim()]).to(hopper) for n, b in blocks.items()}
    dy = torch.randn(rows, m).to(dtype)
    plain, exact = oracle.judged(op, x, blocks, dy)
    x, dy = x.to(hopper), dy.to(hopper)
    for layout in (lambda tensor: tensor, in_larger_buffer, transposed):
        calls.clear()
        call = functools.partial(op.ours, m=m)
        found = oracle.outcome(call, layout(x), parents, layout(dy))
        assert calls == [(mode, 1, dtype) for mode in ("forward", "dgrad", "wgrad")]
        assert found.y.is_contiguous()
        found = oracle.Outcome(
            found.y.cpu(), found.dx.cpu(), {n: g.cpu() for n, g in found.gradients.items()}
        )
        assert_outcome(found, plain, exact)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_land_in_place(hopper, calls, dtype):
    """Equal to the pure path's, added to what is there, nothing else touched."""
    dtype, (rows, m, k) = HALF[dtype], SIZES["odd"]
    grads = {}
    for mode in ("inplace", "dense"):
        torch.manual_seed(1)
        layer = sk.nn.Linear(72, 48, in_dim="i", out_dim="o", activation="silu", grad_mode=mode)
        layer = layer.to(hopper, dtype)
        sk.activate(layer, sk.Submodel(i=k, o=m))
        x = torch.randn(2, rows, k).to(hopper, dtype)
        for param in layer.parameters():
            param.grad = pattern(param.shape, dtype).to(hopper)
        layer(x).backward(torch.randn(2, rows, m).to(hopper, dtype))
        grads[mode] = [param.grad.cpu() for param in layer.parameters()]
    assert calls == [("forward", 1, dtype), ("wgrad", 1, dtype)] * 2
    for found, dense in zip(*grads.values(), strict=True):
        block = (m, k)[: found.dim()]
        beyond = outside(found.shape, block)
        assert_same_bits(found[beyond], pattern(found.shape, dtype)[beyond])
        torch.testing.assert_close(found, dense, rtol=2e-2, atol=2e-2)


def test_autocast_adds_into_float32_gradients(hopper, calls):
    """Without a product in half precision in between, and odd blocks are cast to aligned rows."""
    rows, m, k = SIZES["odd"]
    layer = sk.nn.Linear(72, 48, in_dim="i", out_dim="o").to(hopper)
    sk.activate(layer, sk.Submodel(i=k, o=m))
    x, dy = torch.randn(rows, k, device=hopper), torch.randn(rows, m, device=hopper).bfloat16()
    with torch.autocast(hopper, torch.bfloat16):
        y = layer(x)
        widths = sk.RowWidths([(5, m, k), (rows - 5, 9, 8)])
        z = layer(x, widths)
    y.backward(dy)
    half = (torch.bfloat16, torch.float32)
    assert calls == [("forward", 1, half[0]), ("forward", 2, half[0]), ("wgrad", 1, half[1])]
    wanted = dy.double().T @ x.bfloat16().double()
    torch.testing.assert_close(layer.weight.grad[:m, :k].double(), wanted, rtol=1e-5, atol=1e-4)
    assert not layer.weight.grad[m:].any() and not layer.weight.grad[:, k:].any()
    z.backward(dy)
    assert calls[-1] == ("wgrad", 2, half[1])
    both = wanted.clone()
    for span, out, into in spans([(5, m, k), (rows - 5, 9, 8)]):
        both[:out, :into] += dy[span, :out].double().T @ x[span, :into].bfloat16().double()
    torch.testing.assert_close(layer.weight.grad[:m, :k].double(), both, rtol=1e-5, atol=1e-4)


def test_another_half_precision_is_never_written_into(hopper, calls):
    """A float16 gradient of bfloat16 activations goes through a product of its own."""
    layer = sk.nn.Linear(24, 16).to(hopper, torch.float16)
    x, dy = torch.randn(9, 24, device=hopper).bfloat16(), torch.randn(9, 16, device=hopper)
    with torch.autocast(hopper, torch.bfloat16):
        y = layer(x)
    y.backward(dy.bfloat16())
    assert calls == [("forward", 1, torch.bfloat16), ("wgrad", 1, torch.bfloat16)]
    wanted = (dy.bfloat16().double().T @ x.double()).half()
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("seed", range(4))
def test_ragged(hopper, calls, dtype, seed):
    dtype = HALF[dtype]
    runs = random_runs(random.Random(seed), 60, 90, most=5)
    rows, (_, m, k) = sum(run[0] for run in runs), runs[0]
    x, dy, weight = (torch.randn(*s) for s in ((rows, k), (rows, m), (m, k)))
    x, dy, weight, bias = (t.to(dtype) for t in (x, dy, weight, torch.randn(m)))
    nan = torch.nan
    leaf = fill_past(x.clone(), runs, nan, features="in").to(hopper).requires_grad_()
    layer = sk.nn.Linear(104, 96, in_dim="i", out_dim="o").to(dtype)
    with torch.no_grad():
        layer.weight.copy_(poisoned(weight, layer.weight.shape))
        layer.bias.copy_(poisoned(bias, layer.bias.shape))
    layer.to(hopper)
    for param in layer.parameters():
        param.grad = torch.ones_like(param)
    y = layer(leaf, sk.RowWidths(runs))
    y.backward(fill_past(dy.clone(), runs, nan, features="out").to(hopper))
    assert calls == [(mode, len(runs), dtype) for mode in ("forward", "dgrad", "wgrad")]
    assert y.is_contiguous() and leaf.grad.is_contiguous()
    grads = [param.grad.cpu() for param in layer.parameters()]
    assert all((g[outside(g.shape, (m, k)[: g.dim()])] == 1).all() for g in grads)
    found = [y.detach().cpu(), leaf.grad.cpu(), grads[0][:m, :k], grads[1][:m]]

    def wanted(x, dy, weight, bias):
        return [
            ragged_linear(x, weight, bias, runs),
            ragged_dgrad(dy, weight, runs),
            ragged_wgrad(dy, x, runs, torch.ones_like(weight)),
            ragged_bias_grad(dy, runs, torch.ones_like(bias)),
        ]

    plain = wanted(x, dy, weight, bias)
    exact = wanted(x.double(), dy.double(), weight.double(), bias.double())
    for name, *each in zip(("y", "dx", "dw", "db"), found, plain, exact, strict=True):
        assert_within_twice(*each, name, terms=2 * len(runs))


def test_what_a_fake_says_is_what_is_returned(hopper, calls):
    """Shapes, dtypes and strides, of sizes that leave rows anywhere."""
    weight = torch.randn(48, 72, device=hopper).bfloat16()
    x, dy = (torch.randn(2, 5, n, device=hopper).bfloat16() for n in (51, 37))
    ops, runs = torch.ops.sorted_kernels, [7, 37, 51, 3, 8, 8]
    rows, upstream = x.flatten(0, 1), dy.flatten(0, 1)
    for op, *args in (
        (ops.linear, x, weight, None, 37, "gelu", True),
        (ops.linear_dgrad, dy, weight, 51),
        (ops.linear_wgrad, upstream, rows, weight),
        (ops.linear_wgrad_, upstream, rows, torch.zeros_like(weight)),
        (ops.ragged_linear, rows, weight, None, runs, "silu", True),
        (ops.ragged_linear_dgrad, upstream, weight, runs),
        (ops.ragged_linear_wgrad, upstream, rows, weight, runs),
    ):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, tuple(args), test_utils=checks)
    assert len(calls) >= 7


def test_compiled_graphs_reach_it(hopper, calls):
    """Two graphs for all sizes, and eager's results."""
    layer = sk.nn.Linear(72, 48, in_dim="i", out_dim="o", activation="gelu")
    layer.to(hopper, torch.bfloat16)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for size in (9, 5, 30, 31, 48, 8):
        sk.activate(layer, sk.Submodel(i=size, o=size))
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            x = torch.ones(6, size, device=hopper, dtype=torch.bfloat16).requires_grad_()
            y = run(x)
            (y.view(-1) * torch.arange(6 * size, device=hopper)).sum().backward()
            results.append([y.detach(), x.grad, layer.weight.grad.clone()])
        for eager, found in zip(*results, strict=True):
            torch.testing.assert_close(found, eager, rtol=2e-2, atol=2e-2)
    assert counter.frame_count <= 2
    assert [mode for mode, *_ in calls] == ["forward", "dgrad", "wgrad"] * 12
    torch._dynamo.reset()


def test_what_it_cannot_take_goes_another_way(hopper, calls):
    """A parent whose rows TMA cannot address, and float32: never an error, never a copy."""
    x = torch.randn(4, 8, device=hopper)
    for weight in (
        torch.randn(12, 9, device=hopper).bfloat16(),
        torch.randn(12, 17, device=hopper).bfloat16()[:, 1:],
        torch.randn(12, 16, device=hopper),
    ):
        y = sk.linear(x.to(weight.dtype), weight, out_features=5)
        z = sk.linear(x.to(weight.dtype), weight, out_features=sk.RowWidths([(4, 5, 8)]))
        wanted = torch.nn.functional.linear(x.to(weight.dtype), weight[:5, :8])
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(z, wanted)
    assert calls == []


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ({}, ["odd forward", "odd dgrad", "odd wgrad", "forward", "dgrad", "wgrad"]),
        ({"experimental": False}, []),
        (
            {"experimental": False, "promoted": frozenset({"cuda"})},
            ["odd forward", "odd dgrad", "odd wgrad", "forward", "dgrad", "wgrad"],
        ),
        ({"capability": (8, 0)}, []),
        ({"capability": (10, 0)}, []),
        ({"built": frozenset()}, []),
        ({"forced": "reference"}, []),
    ],
    ids=["trying", "off", "promoted", "sm_80", "sm_100", "not-built", "reference"],
)
def test_when_it_runs(hopper, monkeypatch, facts, wanted):
    """Aligned batches of a size are the library's; odd and ragged ones are not."""
    calls = emulated_gemm.dispatched(hopper, monkeypatch, **facts)
    weight = torch.randn(48, 72, device=hopper).bfloat16().requires_grad_()
    for m, k, widths in ((48, 72, None), (37, 51, None), (40, 64, [(20, 40, 64), (10, 8, 8)])):
        x = torch.randn(30, k, device=hopper).bfloat16().requires_grad_()
        size = m if widths is None else sk.RowWidths(widths)
        sk.linear(x, weight, out_features=size).sum().backward()
    assert [("odd " if runs == 1 else "") + mode for mode, runs, _ in calls] == wanted
