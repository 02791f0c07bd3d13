"""Conv1D, whose weights are (in, out) and lie side by side: each part has a prefix of its own."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import sorted_kernels as sk
from sorted_kernels.ops.gradient import slot_of, staircase_of
from support.oracle import DTYPES, assert_within_twice, outcome
from support.poison import assert_same_bits, in_larger_buffer, pattern

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
modes = pytest.mark.parametrize("grad_mode", ["inplace", "dense"])
both_parts = pytest.mark.parametrize("parts", [1, 3])


def layer_of(K, M, parts, dtype=torch.float32, **options):
    layer = sk.nn.Conv1D(parts * M, K, parts, dtype=dtype, in_dim="i", out_dim="o", **options)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


def active_mask(layer, name):
    """Of a parameter, written without the layer's help."""
    param, m = getattr(layer, name), layer.out_axis.active
    mask = torch.zeros_like(param, dtype=torch.bool)
    for part in range(layer.parts):
        begin = part * layer.nf // layer.parts
        mask[..., begin : begin + m] = True
    if name == "weight":
        mask[layer.in_axis.active :] = False
    return mask


def poison(layer):
    with torch.no_grad():
        for name, param in layer.named_parameters():
            param[~active_mask(layer, name)] = torch.nan


def blocks_of(layer):
    """Contiguous weight (k, parts * m) and bias (parts * m,)."""
    weight, bias = (p.detach()[active_mask(layer, n)] for n, p in layer.named_parameters())
    return {"weight": weight.view(layer.in_axis.active, -1), "bias": bias}


def separate(x, p, parts):
    """One product a part, as a model with separate projections has them."""
    pairs = zip(p["weight"].chunk(parts, -1), p["bias"].chunk(parts), strict=True)
    return torch.cat([torch.nn.functional.linear(x, w.t().contiguous(), b) for w, b in pairs], -1)


@dtypes
@modes
@settings(max_examples=10)
@given(
    full=st.tuples(st.integers(1, 11), st.integers(1, 9)),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    leading=st.sampled_from([(), (4,), (0,), (2, 3)]),
    parts=st.sampled_from([1, 2, 3]),
    cut=st.booleans(),
)
def test_matches_the_oracle(dtype, grad_mode, full, part, leading, parts, cut):
    (K, M), (k, m) = full, (max(1, round(f * p)) for f, p in zip(full, part, strict=True))
    torch.manual_seed(K * M)
    layer = layer_of(K, M, parts, dtype, grad_mode=grad_mode)
    sk.activate(layer, sk.Submodel(i=k, o=m))
    poison(layer)
    x, dy = torch.randn(*leading, k).to(dtype), torch.randn(*leading, parts * m).to(dtype)
    leaf = (in_larger_buffer(x) if cut and leading else x).detach().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    blocks = blocks_of(layer)
    plain = outcome(lambda x, p: separate(x, p, parts), x, blocks, dy)
    wide = {name: block.double() for name, block in blocks.items()}
    exact = outcome(lambda x, p: x @ p["weight"] + p["bias"], x.double(), wide, dy.double())
    assert_within_twice(y.detach(), plain.y, exact.y, "y", terms=1)  # the bias is a sum, too
    assert_within_twice(leaf.grad, plain.dx, exact.dx, "dx", terms=parts)
    for name, param in layer.named_parameters():
        mask = active_mask(layer, name)
        found = param.grad[mask].view(blocks[name].shape)
        assert_within_twice(found, plain.gradients[name], exact.gradients[name], name)
        assert not param.grad[~mask].any()
        assert staircase_of(param).area == mask.sum()
    with torch.no_grad():
        assert_same_bits(layer(leaf), y)


@both_parts
def test_a_window_of_submodels(parts):
    """The union of what several sub-models touch, and nothing else, moves, is clipped, cleared."""
    sizes = [(5, 2), (2, 4), (3, 3)]
    layer, twin = layer_of(6, 5, parts), layer_of(6, 5, parts, grad_mode="dense")
    twin.load_state_dict(layer.state_dict())
    touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in layer.named_parameters()}
    optimizer = sk.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    expected = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: param.detach().clone() for name, param in layer.named_parameters()}
    for k, m in sizes:
        x, dy = torch.randn(4, k), torch.randn(4, parts * m)
        for each in (layer, twin):
            sk.activate(each, sk.Submodel(i=k, o=m))
            each(x).backward(dy)
        for name in touched:
            touched[name] |= active_mask(layer, name)
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, twin.get_parameter(name).grad)
        assert staircase_of(param).area == touched[name].sum()
    norm = sk.optim.clip_grad_norm_(layer.parameters(), 0.5)
    wanted = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    torch.testing.assert_close(norm, wanted)
    optimizer.step()
    expected.step()
    for name, param in layer.named_parameters():
        mask = touched[name]
        torch.testing.assert_close(param[mask], twin.get_parameter(name)[mask])
        assert_same_bits(param[~mask], before[name][~mask])
    optimizer.zero_grad(set_to_none=False)
    assert not any(param.grad.any() for param in layer.parameters())
    optimizer.zero_grad()
    sk.activate(layer, sk.Submodel(i=1, o=1))
    layer(torch.ones(1, 1)).sum().backward()
    for name, param in layer.named_parameters():
        assert torch.equal(param.grad != 0, active_mask(layer, name))


@both_parts
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_updates_are_torchs(parts, kind, dtype):
    layer = layer_of(6, 5, parts, dtype)
    twin = copy.deepcopy(layer).float()
    options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if kind == "SGD" else {})}
    ours = getattr(sk.optim, kind)(layer.parameters(), update="whole", **options)
    theirs = getattr(torch.optim, kind)(twin.parameters(), **options)
    for k, m in [(3, 2), (6, 5), (2, 4)]:
        ours.zero_grad()
        sk.activate(layer, sk.Submodel(i=k, o=m))
        layer(torch.randn(4, k, dtype=dtype)).backward(torch.randn(4, parts * m, dtype=dtype))
        for name, param in layer.named_parameters():
            twin.get_parameter(name).grad = param.grad.float()
        ours.step()
        theirs.step()
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param, twin.get_parameter(name).to(dtype))


def test_gradients_that_came_another_way():
    layer = layer_of(6, 5, 3)
    optimizer = sk.optim.SGD(layer.parameters(), lr=1.0)
    sk.activate(layer, sk.Submodel(i=2, o=2))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = layer.weight.detach().clone()
    layer.weight.grad = pattern((6, 15), torch.float32)
    layer.bias.grad = None
    assert staircase_of(layer.weight).area == 90
    optimizer.step()
    torch.testing.assert_close(layer.weight, before - pattern((6, 15), torch.float32))
    layer(torch.ones(1, 2)).sum().backward()  # adds to it
    mask = active_mask(layer, "weight")
    assert torch.equal(layer.weight.grad, pattern((6, 15), torch.float32) + mask)


def test_an_optimizer_made_before_the_layer_was_elastic():
    plain = torch.nn.Module()
    plain.weight = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = sk.optim.SGD(plain.parameters(), lr=1.0)
    plain.weight.grad = torch.ones(4, 6)
    optimizer.step()
    optimizer.zero_grad()
    layer = layer_of(4, 2, 3)
    layer.weight = plain.weight
    sk.activate(layer, sk.Submodel(i=2, o=1))
    before = plain.weight.detach().clone()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(plain.weight, before - 1.0 * active_mask(layer, "weight"))


@both_parts
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(parts, how):
    layer = layer_of(6, 5, parts)
    sk.activate(layer, sk.Submodel(i=4, o=2))
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, 4)
    for each in (layer, twin):
        each(x).sum().backward()
    torch.testing.assert_close(twin.weight.grad, layer.weight.grad)
    assert staircase_of(twin.weight).area == 4 * 2 * parts
    assert slot_of(twin.weight) is not slot_of(layer.weight)


@both_parts
def test_gradcheck_on_the_dense_path(parts):
    layer = layer_of(4, 3, parts, torch.float64, grad_mode="dense")
    sk.activate(layer, sk.Submodel(i=3, o=2))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    params = (layer.weight, layer.bias)

    def call(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    leaves = [p.detach().clone().requires_grad_() for p in params]
    assert torch.autograd.gradcheck(call, (x, *leaves))
    assert torch.autograd.gradgradcheck(call, (x, *leaves))


def test_double_backward_in_place_is_an_error():
    layer = layer_of(4, 3, 3)
    x = torch.randn(2, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=False)
    assert layer.weight.grad is None
    with pytest.raises(sk.GradientError, match="grad_mode='dense'"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@both_parts
def test_export_is_a_linear_layer(parts):
    layer = layer_of(6, 5, parts)
    sk.activate(layer, sk.Submodel(i=4, o=2))
    small = sk.export(layer, sk.nn.current(layer))
    assert type(small) is torch.nn.Linear
    x = torch.randn(3, 4)
    torch.testing.assert_close(small(x), layer(x))


@both_parts
def test_sixteen_sizes_two_graphs(parts):
    torch._dynamo.reset()
    layer, eager = layer_of(16, 17, parts), layer_of(16, 17, parts)
    eager.load_state_dict(layer.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for k in [16, 3, *range(2, 17)]:
        x, dy = torch.randn(4, k), torch.randn(4, parts * (k + 1))
        for each, run in ((layer, compiled), (eager, eager)):
            sk.activate(each, sk.Submodel(i=k, o=k + 1))
            each.zero_grad()
            run(x).backward(dy)
        for name, param in layer.named_parameters():
            torch.testing.assert_close(param.grad, eager.get_parameter(name).grad)
            assert staircase_of(param) == staircase_of(eager.get_parameter(name))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_wrong_input():
    with pytest.raises(sk.ShapeError, match=r"nf=10 is not a multiple of parts=3"):
        sk.nn.Conv1D(10, 4, 3)
    layer = layer_of(6, 5, 3)
    with pytest.raises(sk.ShapeError, match="Conv1D got x of shape"):
        layer(torch.randn(2, 5))
    with pytest.raises(sk.DTypeError, match="weight has dtype"):
        layer(torch.randn(2, 6, dtype=torch.float64))
    layer.weight.grad = torch.zeros(15, 6).t()
    with pytest.raises(sk.StrideError, match="contiguous"):
        layer(torch.randn(2, 6)).sum().backward()
