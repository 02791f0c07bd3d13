"""Layers on ragged batches: where gradients land, what they leave alone, what is compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import sorted_kernels as sk
from sorted_kernels.ops.gradient import staircase_of
from sorted_kernels.reference import ragged as reference
from support.poison import assert_same_bits, transposed

M, K = 13, 17
KINDS = ("linear", "layer_norm", "rms_norm", "embedding")
ROUTES = ("inplace", "dense", "hook")
kinds = pytest.mark.parametrize("kind", KINDS)
routes = pytest.mark.parametrize("route", ROUTES)


def layer_of(kind, route="inplace", seed=0):
    torch.manual_seed(seed)
    mode = {"grad_mode": "dense" if route == "dense" else "inplace", "dtype": torch.float64}
    layer = {
        "linear": lambda: sk.nn.Linear(K, M, in_dim="i", out_dim="o", activation="silu", **mode),
        "layer_norm": lambda: sk.nn.LayerNorm(K, dim="i", **mode),
        "rms_norm": lambda: sk.nn.RMSNorm(K, eps=1e-6, dim="i", **mode),
        "embedding": lambda: sk.nn.Embedding(M, K, padding_idx=2, dim="i", **mode),
    }[kind]()
    for param in layer.parameters():
        torch.nn.init.normal_(param)
        if route == "hook":
            param.register_hook(lambda gradient: gradient.clone())
    return layer


def submodel(kind, m, k):
    return sk.Submodel(i=k, o=m) if kind == "linear" else sk.Submodel(i=k)


def block_of(kind, name, widths):
    """Shape of what a ragged batch uses of a parameter."""
    m, k = widths.out_features, widths.in_features
    shapes = {"linear": {"weight": (m, k), "bias": (m,)}, "embedding": {"weight": (M, k)}}
    return shapes.get(kind, {}).get(name, (k,))


@st.composite
def row_widths(draw):
    """Sizes of 1, odd, full; neighbours that are equal, or differ in one size only."""
    count = draw(st.integers(1, 5))
    sizes = [
        sorted(draw(st.one_of(st.just(1), st.just(n), st.integers(1, n))) for _ in range(count))
        for n in (M, K)
    ]
    pairs = zip(reversed(sizes[0]), reversed(sizes[1]), strict=True)
    return sk.RowWidths([(draw(st.integers(1, 4)), m, k) for m, k in pairs])


def input_of(kind, widths, width=None):
    if kind == "embedding":
        return torch.randint(M, (widths.rows,))
    return torch.randn(widths.rows, width or widths.in_features, dtype=torch.float64)


def one_by_one(kind, layer, x, widths, dy):
    """Each run as a uniform batch of its own, which other tests judge; returns y and dx."""
    width = widths.out_features if kind == "linear" else widths.in_features
    y = torch.zeros(widths.rows, width, dtype=torch.float64)
    dx = torch.zeros_like(x, dtype=torch.float64)
    begin = 0
    for rows, m, k in widths.runs:
        part = slice(begin, begin + rows)
        sk.activate(layer, submodel(kind, m, k))
        leaf = x[part] if kind == "embedding" else x[part, :k].detach().requires_grad_()
        out = layer(leaf)
        out.backward(dy[part, : out.shape[1]])
        y[part, : out.shape[1]] = out.detach()
        if kind != "embedding":
            dx[part, :k] = leaf.grad
        begin += rows
    return y, dx


@kinds
@settings(max_examples=40)
@given(windows=st.lists(row_widths(), min_size=1, max_size=3), route=st.sampled_from(ROUTES))
def test_equals_the_runs_one_by_one(kind, windows, route):
    """Outputs, input gradients, sums of gradients over a window, and the staircase they cover.

    The window comes twice: the second time into buffers that hold the first one's gradients.
    """
    ragged, uniform = layer_of(kind, route), layer_of(kind, "dense")
    for _ in range(2):
        for layer in (ragged, uniform):
            layer.zero_grad()
        covered = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in ragged.named_parameters()}
        for widths in windows:
            x = input_of(kind, widths, K)
            leaf = x if kind == "embedding" else x.requires_grad_()
            y = ragged(leaf, widths)
            dy = torch.randn_like(y)
            y.backward(dy)
            expected, dx = one_by_one(kind, uniform, x, widths, dy)
            torch.testing.assert_close(y.detach(), expected)
            if kind != "embedding":
                torch.testing.assert_close(leaf.grad, dx)
            for name, mask in covered.items():
                mask[tuple(slice(size) for size in block_of(kind, name, widths))] = True
        for name, param in ragged.named_parameters():
            torch.testing.assert_close(param.grad, uniform.get_parameter(name).grad)
            extents = staircase_of(param).extents()
            found = torch.arange(param.shape[-1] if param.dim() > 1 else 1)
            found = found < torch.tensor(extents)[:, None]
            assert torch.equal(found, covered[name].reshape(len(extents), -1)), name


@kinds
def test_a_backward_writes_no_gradient_outside_the_largest_block(kind):
    """A pattern laid there behind the slot's back is intact, bit for bit."""
    widths = sk.RowWidths([(3, 7, 9), (1, 7, 4), (2, 3, 1)])
    layer = layer_of(kind)
    for first in (True, False):
        y = layer(input_of(kind, widths), widths)
        patterns = {}
        for name, param in layer.named_parameters():
            block = tuple(slice(size) for size in block_of(kind, name, widths))
            if not first:
                outside = torch.ones(param.shape, dtype=torch.bool)
                outside[block] = False
                param.grad.data[outside] = torch.randn(int(outside.sum()), dtype=torch.float64)
                patterns[name] = outside, param.grad.clone()
        y.backward(torch.randn_like(y))
    for name, (outside, before) in patterns.items():
        grad = layer.get_parameter(name).grad
        assert_same_bits(grad[outside], before[outside])
        assert not torch.equal(grad, before)


@kinds
@routes
def test_the_optimizer_moves_what_the_rows_used(kind, route):
    widths = sk.RowWidths([(3, 7, 9), (2, 3, 1)])
    layer = layer_of(kind, route)
    before = {name: param.detach().clone() for name, param in layer.named_parameters()}
    optimizer = sk.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(input_of(kind, widths), widths).square().sum().backward()
    optimizer.step()
    for name, param in layer.named_parameters():
        moved = param.detach() != before[name]
        block = tuple(slice(size) for size in block_of(kind, name, widths))
        assert moved[block].all(), name
        moved[block] = False
        assert not moved.any(), name


@kinds
@routes
def test_ragged_and_uniform_calls_add_up(kind, route):
    widths = sk.RowWidths([(3, 7, 9), (2, 3, 1)])
    ragged, uniform = layer_of(kind, route), layer_of(kind, "dense")
    x, other = input_of(kind, widths), input_of(kind, widths, 11)
    dy = torch.randn(ragged(x, widths).shape, dtype=torch.float64)
    ragged(x, widths).backward(dy)
    one_by_one(kind, uniform, x, widths, dy)
    for layer in (ragged, uniform):
        sk.activate(layer, submodel(kind, 5, 11))
        layer(other).square().sum().backward()
    for name, param in ragged.named_parameters():
        torch.testing.assert_close(param.grad, uniform.get_parameter(name).grad)


@kinds
@pytest.mark.parametrize("layout", ["x-transposed", "dy-transposed", "dy-expanded", "x-cut"])
def test_any_layout_of_inputs(kind, layout, monkeypatch):
    """Back ends that take unit inner strides get them; sums' expanded gradients have none."""
    widths = sk.RowWidths([(3, 7, 9), (1, 7, 4), (2, 3, 1)])

    def checked(function):
        def call(*args):
            for tensor in args[:2]:
                assert not isinstance(tensor, torch.Tensor) or tensor.stride(-1) == 1
            return function(*args)

        return call

    for name in ("ragged_linear", "ragged_dgrad", "ragged_wgrad_into", "ragged_bias_grad_into"):
        monkeypatch.setattr(reference, name, checked(getattr(reference, name)))
    x = input_of(kind, widths)
    if kind == "embedding":
        given_x = x.repeat_interleave(2)[::2]
    elif layout == "x-cut":
        buffer = torch.full((x.shape[0] + 2, x.shape[1] + 5), torch.nan, dtype=x.dtype)
        given_x = buffer[1:-1, 2:-3].copy_(x)
    else:
        given_x = transposed(x) if layout.startswith("x") else x
    layers = layer_of(kind), layer_of(kind)
    y, plain = layers[0](given_x, widths), layers[1](x, widths)
    dy = torch.randn_like(y)
    if layout == "dy-expanded":
        dy = torch.ones((), dtype=y.dtype).expand(y.shape)
    y.backward(transposed(dy) if layout == "dy-transposed" else dy)
    plain.backward(dy.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(y, plain)
    for mine, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["linear", "layer_norm"])
def test_frozen_parameters(kind, frozen):
    widths = sk.RowWidths([(3, 7, 9), (2, 3, 1)])
    layer, free = layer_of(kind), layer_of(kind)
    layer.get_parameter(frozen).requires_grad_(False)
    x = input_of(kind, widths)
    leaves = []
    for module in (layer, free):
        leaves.append(x.clone().requires_grad_())
        module(leaves[-1], widths).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for name, param in layer.named_parameters():
        if name == frozen:
            assert param.grad is None
        else:
            torch.testing.assert_close(param.grad, free.get_parameter(name).grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [(544, 43, 64), (429, 1, 64), (288, 352, 33), (493, 228, 16)])
def test_half_precision_never_reads_past_a_row(dtype, sizes):
    """Sizes at which PyTorch's own product on AMX does read there."""
    m, k, rows = sizes
    widths = sk.RowWidths([(16, m + 40, k + 100), (rows, m, k)])
    weight = torch.randn(m + 40, k + 100).to(dtype).requires_grad_()
    x = torch.randn(widths.rows, k + 100).to(dtype)
    dy = torch.randn(widths.rows, m + 40).to(dtype)
    x[16:, k:], dy[16:, m:] = torch.nan, torch.nan
    leaf = x.requires_grad_()
    y = sk.linear(leaf, weight, out_features=widths)
    y.backward(dy)
    for tensor in (y, leaf.grad, weight.grad):
        assert tensor.isfinite().all()


@kinds
@pytest.mark.parametrize("widths", [5, [(4, 3, 2)], "wide"], ids=repr)
def test_widths_of_another_kind_are_refused(kind, widths):
    with pytest.raises(sk.ShapeError, match="given as RowWidths"):
        layer_of(kind)(torch.randint(M, (4,)) if kind == "embedding" else torch.ones(4, K), widths)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_two_graphs_serve_any_sizes_of_as_many_runs(kind):
    """Compiled gradients land in place too: same values, same staircases, no new graph."""

    def make():
        if kind != "model":
            return [layer_of(kind)]
        square = sk.nn.Linear(K, K, dtype=torch.float64)
        return [layer_of("embedding"), layer_of("layer_norm"), square, layer_of("linear")]

    eager, compiled = (torch.nn.ModuleList(make()) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())

    def apply_to(layers):
        def call(x, widths):
            for index, layer in enumerate(layers):
                inner = index == 2  # both of its sides are as wide as the rows
                x = layer(x, inner_of(widths) if inner else widths)
            return x

        return call

    def inner_of(widths):
        return sk.RowWidths([(rows, k, k) for rows, _, k in widths.runs])

    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(apply_to(compiled), backend=counter, fullgraph=True)
    plain = apply_to(eager)
    first = "embedding" if kind == "model" else kind
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)

        def sizes(limit, generator=generator):
            drawn = torch.randperm(limit - 1, generator=generator)[:3] + 2
            return sorted(drawn.tolist(), reverse=True)

        rows = (torch.randperm(7, generator=generator)[:3] + 2).tolist()
        widths = sk.RowWidths(zip(rows, sizes(M), sizes(K), strict=True))
        x = input_of(first, widths)
        results = [function(x, widths) for function in (fast, plain)]
        torch.testing.assert_close(*results)
        dy = torch.randn_like(results[0])
        for y in results:
            y.backward(dy)
        for (name, param), other in zip(
            compiled.named_parameters(), eager.parameters(), strict=True
        ):
            torch.testing.assert_close(param.grad, other.grad)
            assert staircase_of(param) == staircase_of(other), name
    assert counter.frame_count == 2
