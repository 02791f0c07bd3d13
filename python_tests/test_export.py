"""Export and costs: a sub-model as a plain torch model."""

import collections

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sorted_kernels as sk
from sorted_kernels.models import elastic_residual_mlp
from support.poison import assert_same_bits


def assert_plain(model, own=()):
    """Only torch.nn (and the user's own) classes, contiguous parameters, nothing of ours inside."""
    for name, module in model.named_modules():
        kind = type(module)
        assert kind in own or kind.__module__.startswith("torch.nn."), f"{name}: {kind}"
        for key, value in module.__dict__.items():
            assert "sorted_kernels" not in type(value).__module__, f"{name}.{key}"
            assert not key.startswith("_elastic"), f"{name}.{key}"
    for name, param in model.named_parameters():
        assert param.is_contiguous() and param.is_leaf, name
        assert param.untyped_storage().nbytes() == param.numel() * param.element_size(), name


@pytest.fixture
def model():
    torch.manual_seed(0)
    return elastic_residual_mlp(6, 16, 24, 3, 4, widths=8)


SUBMODELS = [sk.Submodel(depth=d, width=w) for d, w in ((1, 1), (2, 3), (3, 5), (3, 8))]
submodels = pytest.mark.parametrize("submodel", SUBMODELS, ids=str)


@submodels
def test_export_computes_the_same(model, submodel):
    own = {type(model), type(model.blocks[0])}
    plain = sk.export(model, submodel)
    assert_plain(plain, own)
    assert type(plain) is type(model) and len(plain.blocks) == submodel.depth
    assert sk.nn.current(model) == sk.Submodel(depth=3, width=8)
    x = torch.randn(5, 6)
    with sk.active(model, submodel):
        assert_same_bits(plain(x), model(x))
    assert not {p.data_ptr() for p in plain.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


@submodels
def test_counts_are_those_of_the_export(model, submodel):
    plain = sk.export(model, submodel)
    assert sk.count_parameters(model, submodel) == sum(p.numel() for p in plain.parameters())
    with FlopCounterMode(display=False) as counter:
        plain(torch.randn(5, 6))
    assert sk.count_flops(model, submodel, (5, 6)) == counter.get_total_flops() > 0
    assert sk.count_flops(model, submodel, torch.randn(5, 6)) == counter.get_total_flops()
    assert sk.nn.current(model) == sk.Submodel(depth=3, width=8)


def test_flops_count_a_multiply_add_as_two():
    layer = sk.nn.Linear(8, 6, in_dim="i", out_dim="o")
    assert sk.count_flops(layer, sk.Submodel(i=5, o=3), (7, 5)) == 2 * 7 * 5 * 3


def test_the_original_can_go_on_training(model):
    plain = sk.export(model, SUBMODELS[1])
    before = {name: p.clone() for name, p in plain.named_parameters()}
    model(torch.randn(5, 6)).sum().backward()
    sk.optim.SGD(model.parameters(), 0.1).step()
    for name, param in plain.named_parameters():
        assert_same_bits(param, before[name])
        assert param.grad is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_and_requires_grad_flags(model, training):
    model.train(training)
    model.stem.weight.requires_grad_(False)
    plain = sk.export(model, SUBMODELS[1])
    assert all(module.training == training for module in plain.modules())
    assert not plain.stem.weight.requires_grad and plain.stem.bias.requires_grad


class Tied(torch.nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 8, padding_idx=1, dtype=dtype)
        self.norm = torch.nn.RMSNorm(8, dtype=dtype)
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(8, 5, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.head(self.norm(self.embed(x))) * self.scale


@pytest.mark.parametrize("width", [3, 8], ids=["part", "full"])
@pytest.mark.parametrize("head", [True, False], ids=["both-elastic", "head-plain"])
def test_tied_parameters_stay_tied(width, head):
    rules = {"embed": {"features": "w"}, "norm": {"features": "w"}}
    if head:
        rules["head"] = {"in": "w"}
    elif width < 8:
        rules = {"norm": {"features": "w"}}
    model = sk.elasticize(Tied(), rules)
    submodel = sk.Submodel(w=width)
    plain = sk.export(model, submodel)
    assert_plain(plain, {Tied})
    assert plain.head.weight is plain.embed.weight and plain.embed.padding_idx == 1
    if head:
        assert sk.count_parameters(model, submodel) == sum(p.numel() for p in plain.parameters())
    if head or width == 8:
        x = torch.tensor([1, 2, 0])
        with sk.active(model, submodel):  # whose RMS norm rounds in another order than torch's
            torch.testing.assert_close(plain(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_stays(dtype):
    model = sk.elasticize(
        Tied(dtype), {n: {"features": "w"} for n in ("embed", "norm")} | {"head": {"in": "w"}}
    )
    plain = sk.export(model, sk.Submodel(w=3))
    assert {p.dtype for p in plain.parameters()} == {dtype}


def test_nested_and_named_lists():
    inner = [[torch.nn.Linear(4, 4) for _ in range(3)] for _ in range(3)]
    model = torch.nn.Sequential(
        collections.OrderedDict(
            stem=torch.nn.Linear(4, 4),
            body=torch.nn.Sequential(*[torch.nn.Sequential(*layers) for layers in inner]),
            end=torch.nn.Sequential(
                collections.OrderedDict(a=torch.nn.Linear(4, 4), b=torch.nn.Tanh())
            ),
        )
    )
    sk.elasticize(
        model, {"body": {"depth": "outer"}, "body.*": {"depth": "inner"}, "end": {"depth": "end"}}
    )
    x = torch.randn(2, 4)
    for outer, depth, end in ((1, 1, 1), (2, 3, 2), (3, 2, 1), (3, 3, 2)):
        submodel = sk.Submodel(outer=outer, inner=depth, end=end)
        plain = sk.export(model, submodel)
        assert_plain(plain)
        assert [len(layers) for layers in plain.body] == [depth] * outer
        assert list(plain.end._modules) == ["a", "b"][:end]
        assert set(plain.state_dict()) <= set(model.state_dict())
        with sk.active(model, submodel):
            assert_same_bits(plain(x), model(x))
        assert sk.count_parameters(model, submodel) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_fused_activations_survive(activation):
    layer = sk.nn.Linear(8, 6, in_dim="i", activation=activation)
    plain = sk.export(layer, sk.Submodel(i=5))
    assert type(plain) is torch.nn.Linear
    x = torch.randn(4, 5)
    sk.activate(layer, sk.Submodel(i=5))
    assert_same_bits(plain(x), layer(x))


def test_an_export_can_be_saved_and_loaded_by_name(model, tmp_path):
    submodel = SUBMODELS[1]
    plain = sk.export(model, submodel)
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    again = sk.export(elastic_residual_mlp(6, 16, 24, 3, 4, widths=8), submodel)
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    x = torch.randn(5, 6)
    assert_same_bits(again(x), plain(x))


def test_a_wrong_submodel(model):
    for call in (
        lambda: sk.export(model, sk.Submodel(depth=4)),
        lambda: sk.count_parameters(model, sk.Submodel(rank=1)),
        lambda: sk.count_flops(model, sk.Submodel(width=9), (5, 6)),
    ):
        with pytest.raises(sk.DimensionError):
            call()
    assert sk.nn.current(model) == sk.Submodel(depth=3, width=8)
