"""Convolution layers: activation, export, elasticize, costs; and a network of all kinds of them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sorted_kernels as sk
from support.poison import assert_same_bits


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project: the block of MobileNetV2 without its norms."""

    def __init__(self, channels, wide):
        super().__init__()
        self.expand = nn.Conv2d(channels, wide, 1)
        self.depthwise = nn.Conv2d(wide, wide, 5, padding=2, groups=wide)
        self.project = nn.Conv2d(wide, channels, 1, bias=False)

    def forward(self, x):
        return x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(InvertedResidual(8, 24) for _ in range(3))
        self.mix = nn.Conv2d(8, 16, 3, padding="same", groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.mix(x).mean((2, 3)))


RULES = {
    "blocks": {"depth": "depth"},
    "stem": {"out": ("width", 2)},
    "blocks.*.expand": {"in": ("width", 2), "out": "wide"},
    "blocks.*.depthwise": {"in": "wide", "kernel_size": "taps"},
    "blocks.*.project": {"in": "wide", "out": ("width", 2)},
    "mix": {"out": "width"},
    "head": {"in": ("width", 4)},
}
SUBMODELS = [
    sk.Submodel(depth=d, width=w, wide=e, taps=t)
    for d, w, e, t in ((3, 8, 24, 5), (1, 1, 1, 1), (2, 5, 11, 3), (3, 2, 24, 4), (1, 8, 7, 2))
]
submodels = pytest.mark.parametrize("submodel", SUBMODELS, ids=str)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return sk.elasticize(Network(), RULES, dimensions={"width": 8})


def images(channels=3, size=9):
    return torch.randn(2, channels, size, size)


def test_elasticize_keeps_parameters_keys_and_results():
    torch.manual_seed(0)
    plain = Network()
    before, keys, x = dict(plain.named_parameters()), list(plain.state_dict()), images()
    y = plain(x)
    model = sk.elasticize(plain, RULES, dimensions={"width": 8})
    assert model is plain and type(model) is Network
    assert list(model.state_dict()) == keys
    assert all(param is before[name] for name, param in model.named_parameters())
    assert isinstance(model.stem, sk.nn.Conv2d)
    torch.testing.assert_close(model(x), y)
    assert sk.nn.dimensions(model) == {"depth": 3, "width": 8, "wide": 24, "taps": 5}
    model.load_state_dict(Network().state_dict())


@submodels
def test_export_computes_the_same(model, submodel):
    plain, x = sk.export(model, submodel), images()
    for module in plain.modules():
        assert "sorted_kernels" not in type(module).__module__
    for param in plain.parameters():
        assert param.is_contiguous() and param.is_leaf
        assert param.untyped_storage().nbytes() == param.numel() * param.element_size()
    with sk.active(model, submodel):
        y = model(x)
        # Pointwise layers are one product here, and a convolution of oneDNN's there: how sums are
        # split depends on the threads.
        torch.testing.assert_close(y, plain(x), rtol=1e-6, atol=1e-6)
        dy = torch.randn_like(y)
        y.backward(dy)
    plain(x).backward(dy)
    depthwise = plain.blocks[0].depthwise
    stored = model.blocks[0].depthwise
    channels, taps = depthwise.in_channels, depthwise.kernel_size[0]
    cut = slice((5 - taps) // 2, (5 + taps) // 2)
    for name in ("weight", "grad"):
        mine, theirs = stored.weight, depthwise.weight
        if name == "grad":
            mine, theirs = mine.grad, theirs.grad
        torch.testing.assert_close(mine[:channels, :, cut, cut], theirs)
    assert depthwise.groups == channels and depthwise.padding == (taps // 2,) * 2
    assert plain.mix.groups == plain.mix.in_channels // 2 == plain.mix.out_channels // 4


@submodels
def test_counts_are_those_of_the_export(model, submodel):
    plain = sk.export(model, submodel)
    assert sk.count_parameters(model, submodel) == sum(p.numel() for p in plain.parameters())
    with FlopCounterMode(display=False) as counter:
        plain(images())
    assert sk.count_flops(model, submodel, (2, 3, 9, 9)) == counter.get_total_flops() > 0


def test_sizes_that_a_dimension_gives():
    layer = sk.nn.Conv2d(
        8, 16, 7, padding=3, groups=4, in_dim="width", kernel_size_dim="taps", activation="relu"
    )
    layer.dimensions = {"width": 8}
    sizes = []
    for width, taps in ((8, 7), (7, 6), (6, 5), (5, 4), (4, 3), (2, 2), (1, 1)):
        sk.activate(layer, sk.Submodel(width=width, taps=taps))
        sizes.append((*layer.active_shapes()["weight"], layer.in_axis.active))
        y = layer(images(layer.in_axis.active))
        assert y.shape == (2, layer.out_axis.active, 9, 9) and y.min() == 0
    assert sizes == [
        (16, 2, 7, 7, 8), (16, 2, 7, 7, 8), (12, 2, 5, 5, 6), (12, 2, 5, 5, 6), (8, 2, 3, 3, 4),
        (4, 2, 3, 3, 2), (4, 2, 1, 1, 2),
    ]  # fmt: skip
    assert "kernel_size=(taps: 1 of 7)" in repr(layer) and "groups=4" in repr(layer)


@pytest.mark.parametrize(
    ("inner", "outer", "wanted"),
    [
        ("w", None, [(2, 4), (4, 8), (6, 12)]),
        (None, ("w", 8), [(4, 8), (4, 8), (8, 16)]),
        (("w", 6), "w", [(6, 12), (6, 12), (6, 12)]),
        (("w", 4), ("w", 8), [(4, 8), (4, 8), (8, 16)]),
    ],
)
def test_either_axis_of_a_grouped_convolution_may_be_named(inner, outer, wanted):
    model = nn.Sequential(nn.Conv2d(12, 24, 1, groups=6))
    rules = {"in": inner, "out": outer}
    named = {axis: spec for axis, spec in rules.items() if spec is not None}
    sk.elasticize(model, {"0": named}, dimensions={"w": 12})
    found = []
    for width in (1, 3, 5):
        sk.activate(model, sk.Submodel(w=width))
        found.append((model[0].in_axis.active, model[0].out_axis.active))
        assert model(images(found[-1][0])).shape[1] == found[-1][1]
    assert found == wanted


def reflecting():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding_mode="reflect"))


def sharing():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    return model


RULE_ERRORS = {
    "axis": (Network, {"stem": {"features": "w"}}, "axis 'features'.*in, out, kernel_size"),
    "padding_mode": (reflecting, {"0": {"in": "w"}}, "'reflect'; elastic is 'zeros' alone"),
    "not-square": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, (3, 1))), {"0": {"kernel_size": "k"}}, "not square",
    ),
    "two-dimensions": (Network, {"mix": {"in": "a", "out": "b"}}, "one dimension"),
    "multiple": (Network, {"stem": {"kernel_size": ("k", 3)}}, "odd or even"),
    "part-of-groups": (Network, {"mix": {"in": ("w", 9)}}, "multiple_of=18 is not in 1..8"),
    "full-sizes": (Network, {"mix": {"in": "w"}}, "disagree on its full size"),
    "shared-rows": (
        sharing, {"0": {"out": "w"}, "1": {"in": "w"}}, "share a weight, but cut it differently",
    ),
    "shared-kernel": (
        sharing, {"0": {"kernel_size": "k"}, "1": {"in": ("w", 1)}}, "cut it differently",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), {"0": {"in": "w"}}, "no elastic form",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "rules", "message"), RULE_ERRORS.values(), ids=RULE_ERRORS)
def test_rules_that_cannot_be_followed(build, rules, message):
    model = build()
    before = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    with pytest.raises(sk.RuleError, match=message):
        sk.elasticize(model, rules)
    assert before == {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}


def test_shared_weights_cut_alike():
    model = sk.elasticize(sharing(), dict.fromkeys("01", {"in": "w", "out": "w"}))
    sk.activate(model, sk.Submodel(w=3))
    plain, x = sk.export(model, sk.Submodel(w=3)), images(3)
    assert plain[0].weight is plain[1].weight
    for found in (model, plain):
        found(x).square().sum().backward()
    grad = model[0].weight.grad
    torch.testing.assert_close(grad[:3, :3], plain[0].weight.grad)
    assert not grad[3:].any() and not grad[:, 3:].any()


def test_copies_and_pickles_have_gradients_of_their_own():
    layer = sk.nn.Conv2d(6, 6, 3, in_dim="w", out_dim="w")
    sk.activate(layer, sk.Submodel(w=4))
    x = images(4)
    layer(x).sum().backward()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.zero_grad()
        assert_same_bits(other(x), layer(x))
        other(x).sum().backward()
        torch.testing.assert_close(other.weight.grad, layer.weight.grad)
        assert other.weight.grad.data_ptr() != layer.weight.grad.data_ptr()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_every_submodel_trains_as_its_export_does(model, form):
    optimizer = sk.optim.AdamW(model.parameters(), 1e-2)
    x, labels = images().contiguous(memory_format=form), torch.tensor([1, 3])
    for submodel in SUBMODELS:
        plain = sk.export(model, submodel)
        stock = torch.optim.AdamW(plain.parameters(), 1e-2)
        sk.activate(model, submodel)
        for found, each in ((model, optimizer), (plain, stock)):
            each.zero_grad()
            loss = F.cross_entropy(found(x), labels)
            loss.backward()
        ours = sk.optim.clip_grad_norm_(model.parameters(), 1.0)
        theirs = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())
