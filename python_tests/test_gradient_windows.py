"""Accumulation over windows of sub-models, the staircase they leave, and every way to clear it."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sorted_kernels as sk
from sorted_kernels.ops.gradient import slot_if_any, staircase_of
from support.oracle import TRAINED
from support.poison import assert_same_bits
from support.routes import ROUTES, in_place_routes, routes, take

families = pytest.mark.parametrize("family", TRAINED, ids=str)
M, K = 9, 13


def fresh(family, dtype=torch.float64, **options):
    torch.manual_seed(1)
    layer = family.layer(M, K, dtype=dtype, **options)
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_()
    return layer


def backward(family, layer, m, k, seed=0):
    """One random forward and backward of a sub-model; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed * 1000 + m * 50 + k)
    sk.activate(layer, family.submodel(m, k))
    if family.indices:
        x = torch.randint(M, (4,), generator=generator)
    else:
        x = torch.randn(4, k, generator=generator, dtype=layer_dtype(layer))
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))


def layer_dtype(layer):
    return next(layer.parameters()).dtype


def gradients(layer):
    return {name: param.grad.clone() for name, param in layer.named_parameters()}


def dense_sum(family, window):
    layer = fresh(family, grad_mode="dense")
    for seed, (m, k) in enumerate(window):
        backward(family, layer, m, k, seed)
    return gradients(layer)


def mask_of(param):
    staircase = staircase_of(param)
    mask = torch.zeros(staircase.rows, staircase.cols, dtype=torch.bool)
    for row, extent in enumerate(staircase.extents()):
        mask[row, :extent] = True
    return mask if param.dim() > 1 else mask[:, 0]


def union(family, name, shape, window):
    mask = torch.zeros(shape, dtype=torch.bool)
    for m, k in window:
        rows, cols = family.shapes(m, k)[name][0], family.shapes(m, k)[name][-1]
        if family.indices:
            rows = M
        mask[(slice(rows), slice(cols)) if len(shape) > 1 else slice(rows)] = True
    return mask


windows = st.lists(st.tuples(st.integers(1, M), st.integers(1, K)), min_size=1, max_size=5)


@families
@settings(max_examples=12)
@given(first=windows, second=windows, route=st.sampled_from(list(ROUTES)))
@pytest.mark.parametrize("clear", ["none", "zero", "ours-none", "ours-zero"])
def test_windows_equal_sums_of_dense_gradients(family, clear, first, second, route):
    """Two windows with a clearing between them: sums, and staircases that are the exact unions."""
    with pytest.MonkeyPatch.context() as patch:
        layer = fresh(family, **take(patch, route))
        optimizer = sk.optim.SGD(layer.parameters(), 0.0)
        for window in (first, second):
            for seed, (m, k) in enumerate(window):
                backward(family, layer, m, k, seed)
            expected = dense_sum(family, window)
            for name, param in layer.named_parameters():
                torch.testing.assert_close(param.grad, expected[name], rtol=1e-12, atol=1e-12)
                wanted = union(family, name, param.shape, window)
                assert torch.equal(mask_of(param), wanted), name
                assert not param.grad[~wanted].any()
            if clear.startswith("ours"):
                optimizer.zero_grad(set_to_none=clear.endswith("none"))
            else:
                layer.zero_grad(set_to_none=clear.endswith("none"))


@families
@routes
@pytest.mark.parametrize("moment", ["before-forward", "between", "after-backward"])
@pytest.mark.parametrize("by", ["module", "torch-optimizer", "our-optimizer"])
@pytest.mark.parametrize("to_none", [True, False], ids=["to-none", "to-zero"])
def test_zero_grad_at_any_moment(family, route, moment, by, to_none, monkeypatch):
    layer = fresh(family, **take(monkeypatch, route))
    owner = {
        "module": layer,
        "torch-optimizer": torch.optim.SGD(layer.parameters(), 0.1),
        "our-optimizer": sk.optim.SGD(layer.parameters(), 0.1),
    }[by]
    backward(family, layer, M, K)
    sk.activate(layer, family.submodel(5, 7))
    if moment == "before-forward":
        owner.zero_grad(set_to_none=to_none)
    x = torch.randint(M, (4,)) if family.indices else torch.randn(4, 7, dtype=torch.float64)
    y = layer(x)
    if moment == "between":
        owner.zero_grad(set_to_none=to_none)
    y.backward(torch.ones_like(y))
    if moment == "after-backward":
        owner.zero_grad(set_to_none=to_none)
        for param in layer.parameters():
            assert param.grad is None if to_none else not param.grad.any()
        layer(x).backward(torch.ones_like(y))
    alone = fresh(family, grad_mode="dense")
    sk.activate(alone, family.submodel(5, 7))
    alone(x).backward(torch.ones_like(y))
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, alone.get_parameter(name).grad)
        assert torch.equal(mask_of(param), union(family, name, param.shape, [(5, 7)]))


@families
@in_place_routes
@pytest.mark.parametrize(
    "keep",
    [lambda g: g, lambda g: g.detach(), lambda g: g.data, lambda g: g.flatten(), lambda g: g[:2]],
    ids=["itself", "detach", "data", "flatten", "slice"],
)
def test_a_kept_gradient_is_not_overwritten(family, route, keep, monkeypatch):
    layer = fresh(family, **take(monkeypatch, route))
    backward(family, layer, 5, 7)
    kept = {name: keep(param.grad) for name, param in layer.named_parameters()}
    copies = {name: grad.clone() for name, grad in kept.items()}
    for seed in (1, 2):
        layer.zero_grad()
        backward(family, layer, 6, 6, seed)
    for name, grad in kept.items():
        assert_same_bits(grad, copies[name])
    expected = fresh(family, grad_mode="dense")
    backward(family, expected, 6, 6, 2)
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, expected.get_parameter(name).grad)


@families
@in_place_routes
def test_the_buffer_is_allocated_once(family, route, monkeypatch):
    layer = fresh(family, **take(monkeypatch, route))
    places = set()
    for step in range(6):
        layer.zero_grad()
        backward(family, layer, 1 + step % M, K - step)
        places.add(tuple(param.grad.data_ptr() for param in layer.parameters()))
    assert len(places) == 1


@families
@in_place_routes
def test_a_gradient_that_the_user_put_there_is_added_to(family, route, monkeypatch):
    layer = fresh(family, **take(monkeypatch, route))
    backward(family, layer, 9, 13)
    own = {name: torch.randn_like(param) for name, param in layer.named_parameters()}
    for name, param in layer.named_parameters():
        param.grad = own[name].clone()
    backward(family, layer, 5, 7)
    expected = dense_sum(family, [(5, 7)])
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, own[name] + expected[name])
        assert mask_of(param).all()
    layer.zero_grad()
    backward(family, layer, 5, 7)
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, expected[name])


@families
@in_place_routes
def test_what_others_write_into_a_gradient_does_not_stay(family, route, monkeypatch):
    """Gradient noise on the whole tensor is gone after the next clearing, whoever clears."""
    layer = fresh(family, **take(monkeypatch, route))
    optimizer = sk.optim.SGD(layer.parameters(), 0.1)
    for clear in (
        layer.zero_grad,
        lambda: layer.zero_grad(set_to_none=False),
        optimizer.zero_grad,
        lambda: optimizer.zero_grad(set_to_none=False),
    ):
        backward(family, layer, 5, 7)
        for param in layer.parameters():
            param.grad.add_(1.0)
        backward(family, layer, 5, 7)  # accumulates: the noise counts
        for param in layer.parameters():
            assert mask_of(param).all()
        clear()
        backward(family, layer, 5, 7)
        for name, param in layer.named_parameters():
            torch.testing.assert_close(param.grad, dense_sum(family, [(5, 7)])[name])
        clear()


@in_place_routes
@pytest.mark.parametrize("first", ["layer", "foreign"])
@pytest.mark.parametrize("mode", ["inplace", "dense"])
@pytest.mark.parametrize("together", [True, False], ids=["one-backward", "two-backwards"])
def test_foreign_gradients_on_the_same_parameter(route, first, mode, together, monkeypatch):
    layer = sk.nn.Linear(K, M, in_dim="i", out_dim="o", **take(monkeypatch, route))
    layer.grad_mode = mode
    twin = torch.nn.Linear(K, M)
    twin.load_state_dict(layer.state_dict())
    x, z, dy, dz = torch.randn(4, 7), torch.randn(4, K), torch.randn(4, 5), torch.randn(4, M)
    sk.activate(layer, sk.Submodel(i=7, o=5))

    def losses(weight, ours):
        mine = (ours * dy).sum()
        foreign = (F.linear(z, weight).relu() * dz).sum()
        return (mine, foreign) if first == "layer" else (foreign, mine)

    found = losses(layer.weight, layer(x))
    expected = losses(twin.weight, F.linear(x, twin.weight[:5, :7], twin.bias[:5]))
    sum(expected).backward()
    for _ in range(2):  # with a fresh buffer, and with one from the step before
        layer.zero_grad()
        if together:
            sum(found).backward(retain_graph=True)
        else:
            for loss in found:
                loss.backward(retain_graph=True)
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
        assert mask_of(layer.weight).all() and mask_of(layer.bias).sum() == 5


@routes
def test_tied_weights(route, monkeypatch):
    """Two layers on one weight, cut differently, sum into one gradient."""
    options = take(monkeypatch, route)
    a = sk.nn.Linear(K, M, False, in_dim="i", out_dim="o", dtype=torch.float64, **options)
    b = sk.nn.Embedding(M, K, dim="k", dtype=torch.float64, **options)
    c = sk.nn.Linear(K, M, False, in_dim="i", out_dim="o", dtype=torch.float64, **options)
    b.weight = c.weight = a.weight
    model = torch.nn.ModuleList([a, b, c])
    indices, dy, dz, dw = (
        torch.randint(M, (4,)),
        torch.randn(4, 5),
        torch.randn(4, 2),
        torch.rand(2),
    )
    expected = a.weight.detach().clone().requires_grad_()
    y = F.linear(expected[indices][:, :7], expected[:5, :7])
    ((y * dy).sum() + (expected[indices, :7] @ expected[:2, :7].T * dz).sum() + dw.sum()).backward()
    for layer, sizes in ((a, {"i": 7, "o": 5}), (b, {"k": 7}), (c, {"i": 7, "o": 2})):
        sk.activate(layer, sk.Submodel(**sizes))
    for _ in range(2):
        model.zero_grad()
        h = b(indices)
        ((a(h) * dy).sum() + (c(h) * dz).sum()).backward()
        torch.testing.assert_close(a.weight.grad, expected.grad)
        assert mask_of(a.weight)[:, :7].all() and not mask_of(a.weight)[:, 7:].any()


@routes
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_frozen_parameters(route, frozen, monkeypatch):
    for made in (
        sk.nn.Linear(K, M, in_dim="i", out_dim="o", **take(monkeypatch, route)),
        sk.nn.LayerNorm(K, dim="i", **take(monkeypatch, route)),
    ):
        for name in frozen:
            made.get_parameter(name).requires_grad_(False)
        sk.activate(made, sk.Submodel(i=7))
        assert made(torch.randn(4, 7)).requires_grad == (len(frozen) < 2)
        x = torch.randn(4, 7, requires_grad=True)
        made(x).square().sum().backward()
        assert x.grad is not None
        for name, param in made.named_parameters():
            assert (param.grad is None) == (name in frozen)


@pytest.mark.parametrize("family", [f for f in TRAINED if not f.indices], ids=str)
@in_place_routes
def test_autograd_grad_leaves_parameters_alone(family, route, monkeypatch):
    layer = fresh(family, **take(monkeypatch, route))
    sk.activate(layer, family.submodel(5, 7))
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    assert all(param.grad is None for param in layer.parameters())
    y.square().sum().backward(inputs=[x], retain_graph=True)
    assert all(param.grad is None for param in layer.parameters())
    torch.testing.assert_close(x.grad, dx)
    y.square().sum().backward()
    assert all(param.grad is not None for param in layer.parameters())


def test_a_backward_that_skips_the_parameters_leaves_no_expectation():
    """Dense path: the staircase of a later step is that step's alone."""
    layer = sk.nn.Linear(K, M, in_dim="i", out_dim="o", grad_mode="dense")
    x = torch.randn(4, K, requires_grad=True)
    torch.autograd.grad(layer(x).sum(), x)
    sk.activate(layer, sk.Submodel(i=3, o=2))
    layer(x[:, :3]).sum().backward()
    assert staircase_of(layer.weight).corners == [(2, 3)]


@families
@in_place_routes
def test_a_graph_outlives_its_layer(family, route, monkeypatch):
    layer = fresh(family, **take(monkeypatch, route))
    x = torch.randint(M, (4,)) if family.indices else torch.randn(4, K, dtype=torch.float64)
    x = x.requires_grad_(not family.indices)
    y = layer(x)
    del layer
    gc.collect()
    y.sum().backward()
    assert family.indices or x.grad.shape == x.shape


@families
@routes
def test_nothing_keeps_a_deleted_layer_alive(family, route, monkeypatch):
    layer = fresh(family, **take(monkeypatch, route))
    for m, k in ((5, 7), (M, K)):
        backward(family, layer, m, k)
    params = [weakref.ref(param) for param in layer.parameters()]
    slots = [weakref.ref(slot_if_any(param)) for param in layer.parameters()]
    storages = [tensor.untyped_storage() for p in layer.parameters() for tensor in (p, p.grad)]
    del layer
    gc.collect()
    assert not any(ref() for ref in params + slots)
    assert [torch._C._storage_Use_Count(storage._cdata) for storage in storages] == [1] * len(
        storages
    )


@in_place_routes
def test_a_retained_graph_can_be_walked_twice(route, monkeypatch):
    layer = sk.nn.Linear(K, M, in_dim="i", out_dim="o", **take(monkeypatch, route))
    y = layer(torch.randn(4, K)).square().sum()
    y.backward(retain_graph=True)
    once = gradients(layer)
    y.backward()
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, 2 * once[name])
