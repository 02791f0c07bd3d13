"""Layers against the oracle on every gradient route: the same numbers wherever they land."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import sorted_kernels as sk
from sorted_kernels.ops import backend
from sorted_kernels.ops.gradient import staircase_of
from support.oracle import (
    DTYPES,
    EMBEDDING,
    TRAINED,
    Outcome,
    assert_outcome,
    assert_within_twice,
    judged,
)
from support.poison import assert_same_bits, outside, poisoned, prefix
from support.routes import ROUTES, in_place_routes, routes, take

families = pytest.mark.parametrize("family", TRAINED, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def layer_with(family, M, K, blocks, dtype, **options):
    """A layer that is NaN outside the blocks."""
    layer = family.layer(M, K, dtype=dtype, **options)
    with torch.no_grad():
        for name, block in blocks.items():
            param = getattr(layer, name)
            param.copy_(poisoned(block, tuple(param.shape)))
    return layer


def blocks_of(family, M, m, k, dtype):
    return family.parameters(M if family is EMBEDDING else m, k, dtype)


def run(family, layer, x, m, k, dy):
    sk.activate(layer, family.submodel(m, k))
    leaf = x.detach().requires_grad_(x.is_floating_point())
    y = layer(leaf)
    y.backward(dy)
    return Outcome(y.detach(), leaf.grad, {n: p.grad for n, p in layer.named_parameters()})


def upstream(family, m, k, leading, dtype):
    return torch.randn(*leading, m if family.name.startswith("linear") else k).to(dtype)


@families
@dtypes
@settings(max_examples=12)
@given(
    full=st.tuples(st.integers(1, 11), st.integers(1, 23)),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    leading=st.sampled_from([(), (4,), (0,), (2, 3)]),
    route=st.sampled_from(list(ROUTES)),
)
def test_layer_matches_oracle(family, dtype, full, part, leading, route):
    (M, K), (m, k) = full, (max(1, round(f * p)) for f, p in zip(full, part, strict=True))
    torch.manual_seed(M * K)
    blocks = blocks_of(family, M, m, k, dtype)
    x, dy = family.input((*leading, k), M, dtype), upstream(family, m, k, leading, dtype)
    with pytest.MonkeyPatch.context() as patch:
        layer = layer_with(family, M, K, blocks, dtype, **take(patch, route))
        actual = run(family, layer, x, m, k, dy)
    assert_outcome(actual, *judged(family, x, blocks, dy), what=route)
    for name, param in layer.named_parameters():
        assert staircase_of(param).area == blocks[name].numel()


@families
def test_routes_agree_bit_for_bit_in_float64(family, monkeypatch):
    """No kernel has the oracle's dtype, so every route ends in the same PyTorch arithmetic."""
    blocks = blocks_of(family, 9, 5, 7, torch.float64)
    x, dy = family.input((4, 7), 9, torch.float64), upstream(family, 5, 7, (4,), torch.float64)
    found = []
    for route in ROUTES:
        options = take(monkeypatch, route)
        layer = layer_with(family, 9, 13, blocks, torch.float64, **options)
        found.append(run(family, layer, x, 5, 7, dy))
    for other in found[1:]:
        torch.testing.assert_close(other.y, found[0].y, rtol=0, atol=1e-14)
        for name, grad in found[0].gradients.items():
            torch.testing.assert_close(other.gradients[name], grad, rtol=1e-13, atol=1e-14)


@families
@in_place_routes
@pytest.mark.parametrize("kind", ["hook", "post_accumulate_grad_hook"])
def test_a_hook_selects_the_dense_path_and_sees_the_gradient(family, route, kind, monkeypatch):
    blocks = blocks_of(family, 9, 5, 7, torch.float32)
    x, dy = family.input((4, 7), 9, torch.float32), upstream(family, 5, 7, (4,), torch.float32)
    options = take(monkeypatch, route)
    plain = run(family, layer_with(family, 9, 13, blocks, torch.float32, **options), x, 5, 7, dy)
    hooked = layer_with(family, 9, 13, blocks, torch.float32, **options)
    seen = []

    def double(grad):
        seen.append(grad.clone())
        return grad * 2

    handle = (
        hooked.weight.register_hook(double)
        if kind == "hook"
        else hooked.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    )
    for factor in (2, 4) if kind == "hook" else (1, 2):  # the second time, into what is there
        actual = run(family, hooked, x, 5, 7, dy)
        torch.testing.assert_close(actual.gradients["weight"], plain.gradients["weight"] * factor)
    torch.testing.assert_close(seen[0], plain.gradients["weight"])
    assert len(seen) == 2
    assert staircase_of(hooked.weight).area == blocks["weight"].numel()
    handle.remove()
    run(family, hooked, x, 5, 7, dy)
    assert len(seen) == 2


@families
@in_place_routes
@dtypes
def test_only_the_block_of_the_gradient_is_written(family, route, dtype, monkeypatch):
    """A pattern laid outside the block, behind the slot's back, is there after a backward."""
    blocks = blocks_of(family, 9, 5, 7, dtype)
    layer = layer_with(family, 9, 13, blocks, dtype, **take(monkeypatch, route))
    x, dy = family.input((4, 7), 9, dtype), upstream(family, 5, 7, (4,), dtype)
    run(family, layer, x, 5, 7, dy)
    masks = {n: outside(tuple(p.shape), blocks[n].shape) for n, p in layer.named_parameters()}
    patterns = {}
    for name, param in layer.named_parameters():
        alias = param.grad.data  # counts no version
        alias[masks[name]] = torch.arange(1, int(masks[name].sum()) + 1).to(dtype)
        patterns[name] = alias.clone()
    run(family, layer, x, 5, 7, dy)
    for name, param in layer.named_parameters():
        assert_same_bits(param.grad[masks[name]], patterns[name][masks[name]])
        assert not torch.equal(
            param.grad[prefix(blocks[name].shape)], patterns[name][prefix(blocks[name].shape)]
        )


@families
@routes
@pytest.mark.parametrize("layout", ["dy-transposed", "dy-expanded", "x-strided"])
def test_any_layout_of_inputs(family, route, layout, monkeypatch):
    blocks = blocks_of(family, 9, 5, 7, torch.float32)
    layer = layer_with(family, 9, 13, blocks, torch.float32, **take(monkeypatch, route))
    x, dy = family.input((3, 4, 7), 9, torch.float32), upstream(family, 5, 7, (3, 4), torch.float32)
    if layout == "dy-transposed":
        dy = dy.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "dy-expanded":
        dy = dy[:1, :1].expand_as(dy)
    else:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    actual = run(family, layer, x, 5, 7, dy)
    assert_outcome(actual, *judged(family, x, blocks, dy.contiguous()))


NODES = {
    "linear": ("Linear", lambda: sk.nn.Linear(8, 6, in_dim="i", out_dim="o")),
    "layer_norm": ("LayerNorm", lambda: sk.nn.LayerNorm(8, dim="i")),
    "rms_norm": ("RMSNorm", lambda: sk.nn.RMSNorm(8, dim="i")),
}


@pytest.mark.parametrize("kind", NODES)
def test_the_route_follows_what_runs(kind, monkeypatch):
    node, make = NODES[kind]
    layer, names = make(), []

    def note():
        names.append(type(layer(torch.randn(2, 8)).grad_fn).__name__)

    note()
    with torch.autocast("cpu", torch.bfloat16):
        note()
    take(monkeypatch, "node")
    note()
    monkeypatch.undo()
    backend.reset()
    for param in layer.parameters():
        param.requires_grad_(False)
    names.append(layer(torch.randn(2, 8)).grad_fn)
    last = list(layer.parameters())[-1]  # the bias where there is one
    last.requires_grad_()
    note()
    hook = last.register_hook(lambda gradient: None)
    note()
    hook.remove()
    note()
    lean, node = f"_{node}OnBlocksBackward", f"_{node}Backward"
    assert names == [lean, node, node, None, lean, node, lean]


@pytest.mark.parametrize("kind", NODES)
def test_a_frozen_layer_on_blocks_passes_the_gradient_on(kind):
    """PyTorch's own nodes, which can be differentiated twice; nothing lands on the parameters."""
    layer = NODES[kind][1]().requires_grad_(False)
    sk.activate(layer, sk.Submodel(i=5))
    plain = sk.export(layer, sk.Submodel(i=5))
    x, dy = torch.randn(4, 5), torch.randn(4, 6 if kind == "linear" else 5)
    found = []
    for module in (layer, plain):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(module(leaf), leaf, dy, create_graph=True)
        twice = torch.autograd.grad(dx.square().sum(), leaf)[0] if dx.requires_grad else dx
        found.append((dx, twice))
    torch.testing.assert_close(found[0], found[1])
    assert all(param.grad is None for param in layer.parameters())


@pytest.mark.parametrize("route", ["blocks", "node"])
@pytest.mark.parametrize("kind", NODES)
def test_a_second_derivative_on_the_in_place_path_is_an_error(kind, route, monkeypatch):
    options = take(monkeypatch, route)
    assert options == {"grad_mode": "inplace"}
    leaf = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(sk.GradientError, match="dense"):
        torch.autograd.grad(NODES[kind][1]()(leaf).square().sum(), leaf, create_graph=True)


@pytest.mark.parametrize("kind", NODES)
def test_a_weight_changed_between_forward_and_backward_is_an_error(kind):
    layer = NODES[kind][1]()
    y = layer(torch.randn(2, 8, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@families
@in_place_routes
def test_autocast(family, route, monkeypatch):
    """Half-precision activations, float32 gradients, as close to the oracle as torch's own."""
    blocks = blocks_of(family, 40, 33, 24, torch.float32)
    layer = layer_with(family, 40, 48, blocks, torch.float32, **take(monkeypatch, route))
    x = family.input((16, 24), 40, torch.float32)
    dy = upstream(family, 33, 24, (16,), torch.float32)
    _, exact = judged(family, x, blocks, dy)
    stock = {name: block.clone().requires_grad_() for name, block in blocks.items()}
    sk.activate(layer, family.submodel(33, 24))
    with torch.autocast("cpu", torch.bfloat16):
        y, stock_y = layer(x), family.plain(x, stock)
    assert y.dtype == stock_y.dtype
    assert_within_twice(y, stock_y, exact.y, "y")
    y.backward(dy.to(y.dtype))
    stock_y.backward(dy.to(y.dtype))
    for name, wanted in exact.gradients.items():
        found = getattr(layer, name).grad
        assert found.dtype == torch.float32
        assert_within_twice(found[prefix(wanted.shape)], stock[name].grad, wanted, name)


def fake_tensors():
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, fake_tensors, backend.reference_only],
    ids=["inference_mode", "no_grad", "fake", "reference_only"],
)
@pytest.mark.parametrize("kind", ["linear", "layer_norm", "rms_norm"])
def test_a_forward_elsewhere_leaves_nothing_behind(kind, context):
    """Blocks that were worked out within a context must not serve training after it."""
    torch.manual_seed(3)
    make = {
        "linear": lambda: sk.nn.Linear(8, 6, in_dim="i"),
        "layer_norm": lambda: sk.nn.LayerNorm(8, dim="i"),
        "rms_norm": lambda: sk.nn.RMSNorm(8, 1e-6, dim="i"),
    }
    layer = make[kind]()
    sk.activate(layer, sk.Submodel(i=5))
    plain = sk.export(layer, sk.Submodel(i=5))
    x = torch.randn(4, 5)
    with context():
        layer(torch.randn(4, 5))
    for found in (layer, plain):
        found(x).square().sum().backward()
    torch.testing.assert_close(layer(x), plain(x))
    for name, param in plain.named_parameters():
        block = tuple(slice(size) for size in param.shape)
        torch.testing.assert_close(layer.get_parameter(name).grad[block], param.grad)
