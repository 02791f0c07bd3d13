"""cPreResNet20: its layout, every width against the exported network, and torch at full size."""

import copy

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.models import CPRERESNET_RULES, CPreResNet20, elastic_cpreresnet20
from support.poison import assert_same_bits, prefix

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = ["basic", "bottleneck"]
NORMS = ["batch", "instance"]
both = [pytest.mark.parametrize("block", BLOCKS), pytest.mark.parametrize("norm", NORMS)]


def each_kind(test):
    for mark in both:
        test = mark(test)
    return test


def randomised(block, norm, in_channels=3, width=16):
    """A plain network whose norms are not all alike."""
    torch.manual_seed(0)
    model = CPreResNet20(in_channels, norm=norm, block=block, width=width)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.InstanceNorm2d)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
                if module.running_mean is not None:
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 2)
    return model


def test_layout():
    basic, bottleneck = CPreResNet20(), CPreResNet20(block="bottleneck")
    for model, layers in ((basic, 1 + 18 + 1), (bottleneck, 1 + 18 + 1)):
        convs = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
        counted = [m for m in convs if m.kernel_size != (1, 1)] if model is basic else [
            m for n, m in model.named_modules()
            if isinstance(m, torch.nn.Conv2d) and "shortcut" not in n
        ]  # fmt: skip
        assert len(counted) + 1 == layers
    assert [b.convs[-1].out_channels for b in basic.blocks] == [16] * 3 + [32] * 3 + [64] * 3
    outer = [b.convs[-1].out_channels for b in bottleneck.blocks]
    assert outer == [64, 64, 128, 128, 256, 256]
    assert sum(p.numel() for p in basic.parameters()) == 272_282
    assert sum(p.numel() for p in bottleneck.parameters()) == 219_482


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 1, 8, 8), (1, 1, 13, 9)])
@each_kind
def test_full_size_is_torch(block, norm, shape):
    plain = randomised(block, norm, shape[1])
    elastic = sk.elasticize(copy.deepcopy(plain), CPRERESNET_RULES)
    x = torch.randn(shape)
    for training in (False, True):
        if training and norm == "batch" and shape[0] == 1:
            continue
        plain.train(training), elastic.train(training)
        torch.testing.assert_close(elastic(x), plain(x), rtol=1e-5, atol=1e-5)
    for (name, theirs), ours in zip(
        plain.state_dict().items(), elastic.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("width", [1, 7, 12])
@each_kind
def test_a_width_is_its_export(block, norm, width):
    model = sk.elasticize(randomised(block, norm, 1).double(), CPRERESNET_RULES)
    chosen = sk.Submodel(width=width)
    small = sk.export(model, chosen)
    assert small.stem.out_channels == width
    assert small.head.in_features == width * (16 if block == "bottleneck" else 4)
    assert sum(p.numel() for p in small.parameters()) == sk.count_parameters(model, chosen)
    fresh = CPreResNet20(1, norm=norm, block=block, width=width)
    fresh.load_state_dict(small.state_dict())  # the same layout as a network made that wide
    x, dy = torch.randn(4, 1, 8, 8).double(), torch.randn(4, 10).double()
    for training in (False, True):
        for network in (model, small):
            network.train(training)
        with sk.active(model, chosen):
            model.zero_grad()
            y = model(x)
            y.backward(dy)
        small.zero_grad()
        expected = small(x)
        expected.backward(dy)
        torch.testing.assert_close(y, expected)
        for (name, param), theirs in zip(model.named_parameters(), small.parameters(), strict=True):
            block_ = prefix(theirs.shape)
            torch.testing.assert_close(param.grad[block_], theirs.grad, msg=name)


@each_kind
def test_only_the_active_width_is_read_and_moved(block, norm):
    model = sk.elasticize(randomised(block, norm, 1), CPRERESNET_RULES)
    chosen = sk.Submodel(width=6)
    small = sk.export(model, chosen)
    outside = {}
    with torch.no_grad():
        for (name, param), theirs in zip(model.named_parameters(), small.parameters(), strict=True):
            mask = torch.ones_like(param, dtype=torch.bool)
            mask[prefix(theirs.shape)] = False
            outside[name] = mask
            param[mask] = torch.nan
    optimizer = sk.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    x = torch.randn(4, 1, 8, 8)
    sk.activate(model, chosen)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model(x).square().sum().backward()
    optimizer.step()
    for name, param in model.named_parameters():
        mask = outside[name]
        assert_same_bits(param[mask], before[name][mask])
        assert torch.isfinite(param[~mask]).all(), name
        assert not torch.equal(param[~mask], before[name][~mask]), name
        assert not param.grad[mask].any(), name


def test_elastic_network():
    model = elastic_cpreresnet20(1, norm="instance", width=12)
    assert sk.nn.dimensions(model) == {"width": 12}
    model = elastic_cpreresnet20()
    flops = [sk.count_flops(model, sk.Submodel(width=w), (1, 3, 32, 32)) for w in (4, 8, 16)]
    assert flops[2] == 2 * 40_813_184
    assert 3.5 < flops[1] / flops[0] < 4
    assert 3.5 < flops[2] / flops[1] < 4


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"block": "wide"}, {"width": 17}])
def test_bad_options(options):
    with pytest.raises(sk.OptionError, match=next(iter(options))):
        CPreResNet20(**options)
