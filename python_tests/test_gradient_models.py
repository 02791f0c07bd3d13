"""Models as people handle them: copies, files, dtypes, checkpointing, hooks, second derivatives."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import sorted_kernels as sk
from sorted_kernels.models import elastic_residual_mlp
from sorted_kernels.ops.gradient import slot_of, staircase_of
from support.routes import ROUTES, in_place_routes, routes, take

SMALL = sk.Submodel(depth=2, width=3)


@pytest.fixture(params=list(ROUTES))
def model(request, monkeypatch):
    options = take(monkeypatch, request.param)
    made = elastic_residual_mlp(6, 16, 24, 3, 4, widths=8)
    for module in made.modules():
        if hasattr(module, "grad_mode"):
            module.grad_mode = options["grad_mode"]
    return made


def loss_of(model, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 6, generator=generator).to(dtype)
    weights = torch.randn(5, 4, generator=generator).to(dtype)
    return (model(x) * weights).sum()


def reference(model, submodel=SMALL, seed=0, dtype=torch.float32):
    """Gradients by the exported sub-model, laid into full-size zeros."""
    plain = sk.export(model, submodel)
    loss_of(plain, seed, dtype).backward()
    found = {}
    blocks = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        full = torch.zeros_like(param)
        if name in blocks:
            full[tuple(slice(size) for size in blocks[name].shape)] = blocks[name].grad
            found[name] = full
    return found


def assert_gradients(model, expected, factor=1, **tolerance):
    for name, param in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(param.grad, factor * expected[name], **tolerance)
        else:
            assert param.grad is None or not param.grad.any(), name


def test_model_matches_its_export(model):
    sk.activate(model, SMALL)
    loss_of(model).backward()
    assert_gradients(model, reference(model))


def test_deepcopy_is_independent(model):
    sk.activate(model, SMALL)
    loss_of(model).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    twin = copy.deepcopy(model)
    assert sk.nn.current(twin) == SMALL
    assert all(a is not b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    twin.zero_grad()
    loss_of(twin).backward()
    assert_gradients(twin, before)
    loss_of(twin).backward()
    assert_gradients(model, before)
    sk.activate(twin, sk.Submodel(depth=1, width=1))
    assert sk.nn.current(model) == SMALL and len(model.blocks) == 2
    assert slot_of(twin.stem.weight) is twin.stem._slots["weight"]
    assert slot_of(twin.stem.weight) is not slot_of(model.stem.weight)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickled_models(model, how):
    sk.activate(model, SMALL)
    loss_of(model).backward()
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin.zero_grad()
    assert sk.nn.current(twin) == SMALL
    loss_of(twin).backward()
    assert_gradients(twin, reference(model))
    sk.activate(twin, sk.Submodel(depth=3, width=8))
    assert torch.equal(
        twin(torch.ones(1, 6)), sk.export(model, sk.nn.current(twin))(torch.ones(1, 6))
    )


@pytest.mark.parametrize("cleared", [True, False], ids=["cleared", "with-gradients"])
@pytest.mark.parametrize("change", ["double", "bfloat16"])
def test_change_of_dtype_after_a_step(model, change, cleared):
    sk.activate(model, SMALL)
    loss_of(model).backward()
    if cleared:
        model.zero_grad()
    getattr(model, change)()
    dtype = torch.float64 if change == "double" else torch.bfloat16
    loss_of(model, dtype=dtype).backward()
    tolerance = {} if change == "double" else {"rtol": 5e-2, "atol": 0.5}
    if change == "double" and not cleared:
        tolerance = {"rtol": 1e-4, "atol": 1e-4}
    assert all(p.grad.dtype == dtype for p in model.parameters() if p.grad is not None)
    assert_gradients(model, reference(model, dtype=dtype), 1 if cleared else 2, **tolerance)


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_load_state_dict(model, assign):
    sk.activate(model, SMALL)
    loss_of(model).backward()
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    model.zero_grad()
    loss_of(model).backward()
    assert_gradients(model, reference(model))
    assert torch.equal(model.stem.weight, state["stem.weight"])


def test_parameters_swapped_through_data(model):
    sk.activate(model, SMALL)
    for _ in range(2):
        loss_of(model).backward()
        model.zero_grad()
        for param in model.parameters():
            param.data = torch.randn_like(param)
    loss_of(model).backward()
    assert_gradients(model, reference(model))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(model, reentrant):
    sk.activate(model, SMALL)
    expected = reference(model)

    def forward(x):
        x = model.stem(x)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.head(model.norm(x))

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, generator=generator)
    weights = torch.randn(5, 4, generator=generator)
    for _ in range(2):
        model.zero_grad()
        (forward(x) * weights).sum().backward()
        assert_gradients(model, expected)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@routes
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "fresh"])
def test_parametrized_weight(route, cached, monkeypatch):
    layer = sk.nn.Linear(8, 6, in_dim="i", out_dim="o", **take(monkeypatch, route))
    sk.activate(layer, sk.Submodel(i=5, o=3))
    layer(torch.randn(2, 5)).sum().backward()
    layer.zero_grad()
    parametrize.register_parametrization(layer, "weight", Doubled())
    original = layer.parametrizations.weight.original
    x, dy = torch.randn(4, 5), torch.randn(4, 3)
    expected = original.detach().clone().requires_grad_()
    F.linear(x, 2 * expected[:3, :5], layer.bias.detach()[:3]).backward(dy)
    for _ in range(2):
        layer.zero_grad()
        with parametrize.cached() if cached else torch.enable_grad():
            layer(x).backward(dy)
        torch.testing.assert_close(original.grad, expected.grad)
    plain = sk.export(layer, sk.Submodel(i=5, o=3))
    torch.testing.assert_close(plain(x), layer(x))


def second_order(layer, x, dy):
    """Gradient penalty: the parameters' gradients of the squared norm of the input's gradient."""
    (dx,) = torch.autograd.grad((layer(x) * dy).sum(), x, create_graph=True)
    dx.square().sum().backward()
    return {name: param.grad for name, param in layer.named_parameters()}


def penalised(route, monkeypatch):
    options = take(monkeypatch, route)
    layer = sk.nn.Linear(
        8, 6, in_dim="i", out_dim="o", activation="silu", dtype=torch.float64, **options
    )
    sk.activate(layer, sk.Submodel(i=5, o=3))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    return layer, x, torch.randn(4, 3, dtype=torch.float64)


def test_gradient_penalty(monkeypatch):
    layer, x, dy = penalised("dense", monkeypatch)
    expected = second_order(sk.export(layer, sk.nn.current(layer)), x, dy)
    for name, grad in second_order(layer, x, dy).items():
        block = tuple(slice(size) for size in expected[name].shape)
        torch.testing.assert_close(grad[block], expected[name])
        assert staircase_of(layer.get_parameter(name)).area == expected[name].numel()


@in_place_routes
def test_gradient_penalty_is_an_error_in_place(route, monkeypatch):
    layer, x, dy = penalised(route, monkeypatch)
    with pytest.raises(sk.GradientError, match="grad_mode='dense'"):
        second_order(layer, x, dy)


LAYERS = {
    "linear": lambda: (sk.nn.Linear(8, 6, activation="gelu"), torch.randn(4, 8)),
    "layer_norm": lambda: (sk.nn.LayerNorm(8), torch.randn(4, 8)),
    "rms_norm": lambda: (sk.nn.RMSNorm(8), torch.randn(4, 8)),
    "embedding": lambda: (sk.nn.Embedding(6, 8), torch.randint(6, (4,))),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@in_place_routes
@pytest.mark.parametrize("kind", LAYERS)
def test_create_graph_is_an_error_in_place(kind, route, monkeypatch):
    take(monkeypatch, route)
    layer, x = LAYERS[kind]()
    with pytest.raises(sk.GradientError, match="grad_mode='dense'"):
        layer(x).square().sum().backward(create_graph=True)
    layer.zero_grad()
    layer.grad_mode = "dense"
    layer(x).square().sum().backward(create_graph=True)
    assert layer.weight.grad.requires_grad
    layer.zero_grad()


@routes
def test_functional_call_with_other_weights(route, monkeypatch):
    layer = sk.nn.Linear(8, 6, in_dim="i", out_dim="o", **take(monkeypatch, route))
    sk.activate(layer, sk.Submodel(i=5, o=3))
    x, weight = torch.randn(4, 5), torch.randn(6, 8, requires_grad=True)
    y = torch.func.functional_call(layer, {"weight": weight}, (x,))
    y.sum().backward()
    expected = weight.detach().clone().requires_grad_()
    F.linear(x, expected[:3, :5]).sum().backward()
    torch.testing.assert_close(weight.grad, expected.grad)
    assert layer.weight.grad is None and layer.bias.grad is not None


@in_place_routes
def test_torch_func_transforms_are_never_silently_wrong(route, monkeypatch):
    layer = sk.nn.Linear(8, 6, **take(monkeypatch, route))
    params = dict(layer.named_parameters())

    def loss(params):
        return torch.func.functional_call(layer, params, (torch.ones(1, 8),)).sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(params)
