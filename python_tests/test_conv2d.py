"""Convolution over a prefix against the float64 oracle: kinds, dtypes, memory formats, routes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sorted_kernels as sk
from sorted_kernels.ops.conv2d_ops import _is_linear
from sorted_kernels.ops.gradient import staircase_of
from sorted_kernels.ops.library import load_compiled
from sorted_kernels.reference.conv2d import Geometry
from support.conv import FORMATS, KINDS, Conv, assert_zero_outside, pair
from support.oracle import DTYPES, Outcome, assert_within_twice, outcome
from support.poison import assert_same_bits, in_larger_buffer
from support.routes import ROUTES, in_place_routes, routes, take

kinds = pytest.mark.parametrize("conv", KINDS.values(), ids=KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
forms = pytest.mark.parametrize("form", FORMATS)
some = pytest.mark.parametrize(
    "conv",
    [KINDS[name] for name in ("dense", "pointwise", "depthwise", "grouped", "cropped")],
    ids=["dense", "pointwise", "depthwise", "grouped", "cropped"],
)


def assert_conv(conv, actual, x, blocks, dy, what=""):
    """Outputs and gradients as the oracle has them, and nothing outside the block."""
    plain, exact = conv.judged(x, blocks, dy)
    assert_within_twice(actual.y, plain.y, exact.y, f"{what} y")
    if actual.dx is not None:
        assert_within_twice(actual.dx, plain.dx, exact.dx, f"{what} dx")
    for name, wanted in exact.gradients.items():
        found = actual.gradients[name][conv.part(name)]
        assert_within_twice(found, plain.gradients[name], wanted, f"{what} d{name}")
    assert_zero_outside(conv, actual.gradients)


def run_layer(layer, x, dy):
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    return Outcome(y.detach(), leaf.grad, {n: p.grad for n, p in layer.named_parameters()})


def layer_with(conv, blocks, dtype=torch.float32, **options):
    """A layer that is NaN outside the blocks."""
    layer = conv.layer(dtype, **options)
    with torch.no_grad():
        for name, parent in conv.parents(blocks).items():
            getattr(layer, name).copy_(parent)
    return layer


@kinds
@dtypes
@forms
def test_matches_oracle_with_poison_outside_the_block(conv, dtype, form):
    x, blocks = conv.input(dtype, form), conv.blocks(dtype)
    dy = conv.upstream(x)
    actual = outcome(conv.ours, x, conv.parents(blocks), dy)
    assert_conv(conv, actual, x, blocks, dy)
    if conv.batch and "same" not in str(conv.padding):
        assert actual.y.stride() == conv.plain(x, blocks).stride()
        assert actual.y.is_contiguous(memory_format=FORMATS[form])


@st.composite
def convs(draw):
    per_in, per_out, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 1
    whole = draw(st.integers(1, 6))
    if draw(st.booleans()):
        groups, active = whole, draw(st.integers(1, whole))
        channels = (groups * per_out, groups * per_in), (active * per_out, active * per_in)
    else:
        full = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        channels = full, tuple(draw(st.integers(1, size)) for size in full)
    kernel = draw(st.integers(1, 5))
    taps = draw(st.sampled_from([None, *range(kernel, 0, -2)]))
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 2))
    dilation = draw(pairs)
    reach = tuple(gap * ((taps or kernel) - 1) + 1 for gap in dilation)
    return Conv(
        *channels, kernel, taps, draw(pairs), draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        dilation, groups, tuple(draw(st.integers(r, r + 6)) for r in reach),
        draw(st.integers(1, 3)), draw(st.booleans()),
        draw(st.sampled_from([None, "relu", "gelu", "silu"])),
    )  # fmt: skip


@settings(max_examples=60)
@given(
    conv=convs(),
    form=st.sampled_from(list(FORMATS)),
    route=st.sampled_from([*ROUTES, "function"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_random_geometries(conv, form, route, dtype):
    torch.manual_seed(7)
    x, blocks = conv.input(dtype, form), conv.blocks(dtype)
    dy = conv.upstream(x)
    if route == "function":
        actual = outcome(conv.ours, x, conv.parents(blocks), dy)
    else:
        with pytest.MonkeyPatch.context() as patch:
            layer = layer_with(conv, blocks, dtype, **take(patch, route))
            actual = run_layer(layer, x, dy)
    assert_conv(conv, actual, x, blocks, dy, route)


@kinds
@routes
@forms
def test_layers_on_every_route(conv, route, form, monkeypatch):
    x, blocks = conv.input(torch.float32, form), conv.blocks(torch.float32)
    dy = conv.upstream(x)
    layer = layer_with(conv, blocks, **take(monkeypatch, route))
    assert_conv(conv, run_layer(layer, x, dy), x, blocks, dy, route)
    rows, cols = conv.block_shape[:2]
    assert staircase_of(layer.weight).corners == [(rows, cols)]
    again = run_layer(layer, x, dy)  # into what is there
    _, exact = conv.judged(x, blocks, dy)
    wanted = exact.gradients["weight"] * 2
    torch.testing.assert_close(
        again.gradients["weight"][conv.where].double(), wanted, rtol=1e-4, atol=1e-4
    )


@some
@in_place_routes
def test_weights_in_channels_last_memory(conv, route, monkeypatch):
    """As ``model.to(memory_format=torch.channels_last)`` leaves them; gradients lie alike."""
    x, blocks = conv.input(torch.float32, "channels-last"), conv.blocks(torch.float32)
    dy = conv.upstream(x)
    layer = layer_with(conv, blocks, **take(monkeypatch, route))
    run_layer(layer, x, dy)
    layer.zero_grad()
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        layer.zero_grad()
        assert_conv(conv, run_layer(layer, x, dy), x, blocks, dy, route)
    assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)
    parents = conv.parents(blocks)
    parents["weight"] = parents["weight"].to(memory_format=torch.channels_last)
    assert_conv(conv, outcome(conv.ours, x, parents, dy), x, blocks, dy)


@some
@forms
def test_routes_agree_in_float64(conv, form, monkeypatch):
    x, blocks = conv.input(torch.float64, form), conv.blocks(torch.float64)
    dy = conv.upstream(x)
    found = []
    for route in ROUTES:
        layer = layer_with(conv, blocks, torch.float64, **take(monkeypatch, route))
        found.append(run_layer(layer, x, dy))
    for other in found[1:]:
        torch.testing.assert_close(other.y, found[0].y, rtol=0, atol=1e-13)
        torch.testing.assert_close(other.dx, found[0].dx, rtol=1e-12, atol=1e-13)
        for name, gradient in found[0].gradients.items():
            torch.testing.assert_close(other.gradients[name], gradient, rtol=1e-12, atol=1e-13)


@some
@in_place_routes
def test_only_the_block_of_the_gradient_is_written(conv, route, monkeypatch):
    """A pattern laid outside the block, behind the slot's back, is there after a backward."""
    x, blocks = conv.input(torch.float32), conv.blocks(torch.float32)
    dy = conv.upstream(x)
    layer = layer_with(conv, blocks, **take(monkeypatch, route))
    run_layer(layer, x, dy)
    patterns = {}
    for name, param in layer.named_parameters():
        mask = torch.ones(param.shape, dtype=torch.bool)
        mask[conv.part(name)] = False
        alias = param.grad.data  # counts no version
        alias[mask] = torch.arange(1, int(mask.sum()) + 1).float()
        patterns[name] = mask, alias.clone()
    run_layer(layer, x, dy)
    for name, param in layer.named_parameters():
        mask, before = patterns[name]
        assert_same_bits(param.grad[mask], before[mask])
        assert not torch.equal(param.grad, before)


@in_place_routes
def test_a_smaller_block_clears_what_a_larger_one_left(route, monkeypatch):
    """The gradient's buffer is used again, where the ring around a cropped kernel was written."""
    conv = KINDS["cropped"]
    blocks = conv.blocks(torch.float32)
    options = take(monkeypatch, route)
    layer = layer_with(conv, blocks, **options)
    with torch.no_grad():
        layer.weight.nan_to_num_()
        layer.bias.nan_to_num_()
    sk.activate(layer, sk.Submodel(i=7, o=9, k=7))
    y = layer(torch.randn(1, 7, 5, 5))
    y.backward(torch.randn_like(y))
    kept = layer.weight.grad.data_ptr()
    assert layer.weight.grad.all()
    layer.zero_grad(set_to_none=True)
    sk.activate(layer, conv.submodel)
    x = conv.input(torch.float32)
    dy = conv.upstream(x)
    assert_conv(conv, run_layer(layer, x, dy), x, blocks, dy)
    assert layer.weight.grad.data_ptr() == kept


@some
@routes
@pytest.mark.parametrize("layout", ["dy-transposed", "dy-expanded", "x-cut", "x-transposed"])
def test_any_layout_of_inputs(conv, route, layout, monkeypatch):
    layer = layer_with(conv, blocks := conv.blocks(torch.float32), **take(monkeypatch, route))
    x = conv.input(torch.float32)
    dy = conv.upstream(x)
    given_x, given_dy = x, dy
    if layout == "dy-transposed":
        given_dy = dy.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "dy-expanded":
        given_dy = dy = dy[:1, :, :1].expand_as(dy)
    elif layout == "x-cut":
        given_x = in_larger_buffer(x)
    else:
        given_x = x.transpose(1, 3).contiguous().transpose(1, 3)
    assert_conv(conv, run_layer(layer, given_x, given_dy), x, blocks, dy.contiguous(), layout)


@some
@dtypes
@forms
def test_prefix_view_and_contiguous_copy_give_the_same_bits(conv, dtype, form):
    x, blocks = conv.input(dtype, form), conv.blocks(dtype)
    dy, parents = conv.upstream(x), conv.parents(blocks)
    groups = conv.active_groups
    alone = conv.change(
        full=(conv.active[0], conv.active[1]), kernel=conv.taps or conv.kernel, taps=None,
        groups=groups if conv.groups > 1 else 1,
    )  # fmt: skip
    copy, view = outcome(alone.ours, x, blocks, dy), outcome(conv.ours, x, parents, dy)
    assert_same_bits(view.y, copy.y)
    assert_same_bits(view.dx, copy.dx)
    for name, gradient in copy.gradients.items():
        assert_same_bits(view.gradients[name][conv.part(name)].contiguous(), gradient)


DERIVED = {
    "dense": Conv((2, 2), (1, 2), 3, None, padding=1),
    "strided": Conv((2, 3), (2, 2), (3, 2), None, (2, 1), (1, 0)),
    "same-uneven": Conv((2, 2), (2, 1), (2, 1), None, 1, "same", bias=False),
    "pointwise": Conv((3, 3), (2, 2), 1, None, activation="silu"),
    "depthwise": Conv((3, 3), (2, 2), 3, None, padding=1, groups=3),
    "grouped": Conv((3, 6), (2, 4), 1, None, groups=3, activation="gelu"),
    "cropped": Conv((2, 2), (1, 1), 3, 1),
}


@pytest.mark.parametrize("conv", DERIVED.values(), ids=DERIVED)
@forms
def test_first_and_second_derivatives(conv, form):
    conv = conv.change(batch=1, size=(3, 3))
    parents = conv.parents(conv.blocks(torch.float64), 0.5)
    inputs = [conv.input(torch.float64, form), *parents.values()]
    inputs = [value.requires_grad_() for value in inputs]

    def call(x, *params):
        return conv.ours(x, dict(zip(parents, params, strict=True)))

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    y = call(*inputs)
    dy = torch.randn_like(y)
    once = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    again = torch.autograd.grad(y, inputs, dy, create_graph=True)  # computed another way
    torch.testing.assert_close(again, once)


@some
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
@pytest.mark.parametrize("route", ["function", "blocks", "node"])
def test_only_the_wanted_gradients(conv, wanted, route, monkeypatch):
    x, blocks = conv.input(torch.float32), conv.blocks(torch.float32)
    dy = conv.upstream(x)
    leaf = x.detach().requires_grad_(wanted == "x")
    if route == "function":
        params = {n: p.requires_grad_(n == wanted) for n, p in conv.parents(blocks).items()}
        conv.ours(leaf, params).backward(dy)
    else:
        layer = layer_with(conv, blocks, **take(monkeypatch, route))
        params = dict(layer.named_parameters())
        for name, param in params.items():
            param.requires_grad_(name == wanted)
        layer(leaf).backward(dy)
    grads = {"x": leaf.grad, **{name: param.grad for name, param in params.items()}}
    assert [name for name, grad in grads.items() if grad is not None] == [wanted]
    _, exact = conv.judged(x, blocks, dy)
    right = exact.dx if wanted == "x" else exact.gradients[wanted]
    found = grads[wanted] if wanted == "x" else grads[wanted][conv.part(wanted)]
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)


@in_place_routes
def test_a_backward_for_the_input_alone_leaves_parameters_without_gradients(route, monkeypatch):
    conv = KINDS["dense"]
    layer = layer_with(conv, conv.blocks(torch.float32), **take(monkeypatch, route))
    x = conv.input(torch.float32).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert dx.any() and layer.weight.grad is None and layer.bias.grad is None


def test_saves_only_what_the_wanted_gradients_need():
    conv = KINDS["dense"]
    x, parents = conv.input(torch.float32), conv.parents(conv.blocks(torch.float32))

    def saved(**wanted):
        kept = []
        leaf = x.detach().requires_grad_(wanted.get("x", False))
        leaves = {n: p.detach().requires_grad_(wanted.get(n, False)) for n, p in parents.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), id):
            conv.ours(leaf, leaves)
        return kept

    x_at, weight_at = x.data_ptr(), parents["weight"].data_ptr()
    assert saved() == []
    assert saved(x=True) == [weight_at]
    assert saved(weight=True) == [x_at]
    assert saved(bias=True) == []


@pytest.mark.parametrize("kind", ["hook", "post_accumulate_grad_hook"])
def test_a_hook_selects_the_dense_path_and_sees_the_gradient(kind):
    conv = KINDS["cropped"]
    x, blocks = conv.input(torch.float32), conv.blocks(torch.float32)
    dy, layer = conv.upstream(x), layer_with(conv, blocks)
    seen = []
    handle = (
        layer.weight.register_hook(lambda grad: seen.append(grad.clone()))
        if kind == "hook"
        else layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    )
    assert_conv(conv, run_layer(layer, x, dy), x, blocks, dy)
    torch.testing.assert_close(seen[0], layer.weight.grad)
    handle.remove()
    run_layer(layer, x, dy)
    assert len(seen) == 1
    assert staircase_of(layer.weight).corners == [conv.block_shape[:2]]


def test_the_route_follows_what_runs(monkeypatch):
    layer = sk.nn.Conv2d(20, 18, 3, in_dim="i", out_dim="o")
    names = []

    def note(**options):
        names.append(type(layer(torch.randn(2, 20, 5, 5), **options).grad_fn).__name__)

    note()
    with torch.autocast("cpu", torch.bfloat16):
        note()
    names.append(type(layer(torch.randn(20, 5, 5)).grad_fn).__name__)
    hook = layer.bias.register_hook(lambda gradient: None)
    note()
    hook.remove()
    note()
    take(monkeypatch, "node")
    note()
    lean, node = "ConvolutionBackward0", "_Conv2dBackward"
    assert names == [lean, node, "SqueezeBackward1", node, lean, node]


@pytest.mark.parametrize(
    ("name", "ours"),
    [("dense", load_compiled()), ("pointwise", True), ("odd", False), ("depthwise", False)],
)
def test_where_pytorch_is_slower_a_node_of_ours_runs(name, ours):
    """Products, and few channels: of contiguous activations."""
    conv = KINDS[name]
    layer = layer_with(conv, conv.blocks(torch.float32))
    found = []
    for form in FORMATS:
        x = conv.input(torch.float32, form)
        found += [type(layer(x.requires_grad_(wants)).grad_fn).__name__ for wants in (True, False)]
    theirs = ["ConvolutionBackward0"] * 2
    assert found == (["_Conv2dOnBlocksBackward"] * 2 if ours else theirs) + theirs


@in_place_routes
def test_double_backward_in_place_is_an_error(route, monkeypatch):
    conv = KINDS["dense"]
    layer = layer_with(conv, conv.blocks(torch.float32), **take(monkeypatch, route))
    y = layer(conv.input(torch.float32).requires_grad_())
    with pytest.raises(sk.GradientError, match="grad_mode='dense'"):
        y.sum().backward(create_graph=True)


@some
@in_place_routes
@forms
def test_autocast(conv, route, form, monkeypatch):
    conv = conv.change(activation="gelu")
    x, blocks = conv.input(torch.float32, form), conv.blocks(torch.float32)
    layer = layer_with(conv, blocks, **take(monkeypatch, route))
    stock = {name: block.clone().requires_grad_() for name, block in blocks.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, stock_y = layer(x), conv.plain(x, stock)
    dy = torch.randn_like(stock_y)
    _, exact = conv.judged(x, blocks, dy.float())
    assert_within_twice(y, stock_y, exact.y, "y")
    y.backward(dy)
    stock_y.backward(dy)
    for name, wanted in exact.gradients.items():
        found = getattr(layer, name).grad
        assert found.dtype == torch.float32
        assert_within_twice(found[conv.part(name)], stock[name].grad, wanted, name)


@some
def test_no_grad_gives_the_same_output(conv):
    x, blocks = conv.input(torch.float32), conv.blocks(torch.float32)
    parents, layer = conv.parents(blocks), layer_with(conv, blocks)
    loud = outcome(conv.ours, x, parents, conv.upstream(x)).y
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_same_bits(conv.ours(x, parents).clone(), loud)
            assert_same_bits(layer(x).clone(), loud)


def test_one_image_without_a_batch():
    conv = KINDS["dense"]
    x, blocks = conv.input(torch.float32), conv.blocks(torch.float32)
    parents, layer = conv.parents(blocks), layer_with(conv, blocks)
    wanted = F.conv2d(x, blocks["weight"], blocks["bias"], padding=1)
    torch.testing.assert_close(conv.ours(x[0], parents), wanted[0])
    torch.testing.assert_close(layer(x[0]), wanted[0])
    layer(x[0]).sum().backward()
    assert layer.weight.grad[conv.where].any()


@pytest.mark.parametrize("update", ["active", "whole"])
@forms
def test_the_optimizers_move_the_block(update, form):
    """As torch's AdamW moves the parameters of a stand-alone convolution of the active size."""
    conv = KINDS["odd"]
    x, blocks = conv.input(torch.float32), conv.blocks(torch.float32)
    dy, layer = conv.upstream(x), conv.layer()
    with torch.no_grad():
        for name, parent in conv.parents(blocks, 2.0).items():
            getattr(layer, name).copy_(parent)
    layer.to(memory_format=FORMATS[form])
    before = {name: param.detach().clone() for name, param in layer.named_parameters()}
    plain = sk.export(layer, conv.submodel)
    ours = sk.optim.AdamW(layer.parameters(), 1e-2, update=update)
    theirs = torch.optim.AdamW(plain.parameters(), 1e-2)
    for turn in range(3):
        for module, optimizer in ((layer, ours), (plain, theirs)):
            optimizer.zero_grad()
            module(x).backward(dy)
            optimizer.step()
        if turn == 1:  # states follow their parameter
            layer.to(memory_format=torch.channels_last)
    for name, param in plain.named_parameters():
        found = getattr(layer, name).detach()
        torch.testing.assert_close(found[conv.part(name)], param, rtol=1e-4, atol=1e-5)
        rest = torch.ones(found.shape, dtype=torch.bool)
        rest[conv.part(name)] = False
        assert torch.equal(found[rest], before[name][rest]) == (update == "active")


@pytest.mark.parametrize("taps", [5, 3, 1])
def test_a_cropped_kernel_is_the_stored_one_with_zeros_around_its_centre(taps):
    layer = sk.nn.Conv2d(6, 4, 5, stride=2, padding=3, dilation=1, kernel_size_dim="k")
    x = torch.randn(2, 6, 9, 8)
    sk.activate(layer, sk.Submodel(k=taps))
    around = torch.zeros_like(layer.weight)
    centre = (..., *[slice((5 - taps) // 2, (5 + taps) // 2)] * 2)
    around[centre] = layer.weight.detach()[centre]
    torch.testing.assert_close(layer(x), F.conv2d(x, around, layer.bias, 2, 3))
    assert pair(layer.stock().padding) == ((3 - (5 - taps) // 2),) * 2


class OnCuda(torch.Tensor):
    """Says that it is there."""

    is_cuda = True


@pytest.mark.parametrize(("kernel", "linear"), [(1, True), (3, False)])
def test_the_centre_of_a_larger_kernel_is_no_linear_weight(kernel, linear):
    """Linear kernels read rows; the channels of a cropped kernel lie its taps apart."""
    x = torch.empty(2, 4, 5, 5).to(memory_format=torch.channels_last).as_subclass(OnCuda)
    weight = torch.empty(8, 6, kernel, kernel)
    centre = weight[:8, :4, kernel // 2 : kernel // 2 + 1, kernel // 2 : kernel // 2 + 1]
    assert _is_linear(x, centre, Geometry((1, 1), (0, 0), (1, 1), 1)) is linear
