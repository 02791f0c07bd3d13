"""MobileNetV2 of ``transformers``: every width and depth, and ordinary checkpoints of them."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.models.architectures import mobilenet_v2 as table
from support import mobilenet
from support.poison import assert_same_bits, prefix

transformers = mobilenet.transformers
pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def untouched():
    return mobilenet.plain()


@pytest.fixture
def elastic(untouched):
    return sk.elasticize(copy.deepcopy(untouched))


CONFIGURATIONS = [
    {"depth_multiplier": 1.4, "depth_divisible_by": 8, "min_depth": 8, "finegrained_output": True},
    {"depth_multiplier": 0.35, "finegrained_output": True, "output_stride": 32},
    {"depth_multiplier": 0.75, "depth_divisible_by": 1, "min_depth": 1, "expand_ratio": 3.3},
    {"first_layer_is_expansion": False, "output_stride": 16},
]


@pytest.mark.parametrize("changes", CONFIGURATIONS)
def test_sizes_are_those_of_transformers(changes):
    """The table's sizes at each width, against models that transformers makes of its config."""
    config = transformers.MobileNetV2Config(**{**mobilenet.OPTIONS, **changes})

    def made(width):
        fields = {**config.to_dict(), "depth_multiplier": table._multiplier(config, width)}
        with torch.device("meta"):
            return transformers.MobileNetV2Model(transformers.MobileNetV2Config(**fields))

    full = made(10)
    rules = {path: axes for path, axes in table._rules(config).items() if path != "layer"}
    said = 0
    for width in range(1, 11):
        model = made(width)
        for path, axes in rules.items():
            if path.startswith("conv_stem.expand_1x1") and config.first_layer_is_expansion:
                continue
            module = model.get_submodule(path)
            names = {"in": "in_channels", "out": "out_channels", "features": "num_features"}
            for axis, (dimension, sizes) in axes.items():
                assert dimension == "width"
                assert getattr(module, names[axis]) == sizes[width - 1], (path, axis, width)
        same = [b.use_residual for b in model.layer] == [b.use_residual for b in full.layer]
        fields = table._configuration(config, {"width": width, "depth": 16})
        assert (fields is not None) == same, width
        said += same
    assert said >= 5
    assert table._configuration(config, {"width": 10, "depth": 15}) is None


@pytest.mark.parametrize(
    "changes", [{}, {"tf_padding": False}, {"first_layer_is_expansion": False}]
)
def test_full_size_is_the_untouched_model(changes):
    model = mobilenet.plain(**changes)
    before, keys = model(X).logits, list(model.state_dict())
    assert before.std() > 0.05
    assert sk.elasticize(model) is model
    assert sk.nn.dimensions(model) == {"depth": 16, "width": 10}
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(X).logits, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 6, 16])
@pytest.mark.parametrize("width", [1, 5, 10])
def test_a_submodel_is_its_export(elastic, depth, width):
    chosen = sk.Submodel(depth=depth, width=width)
    small = sk.export(elastic, chosen)
    assert len(small.mobilenet_v2.layer) == depth
    assert type(small) is type(elastic)
    head = small.mobilenet_v2.conv_1x1.convolution
    last = small.mobilenet_v2.layer[-1].reduce_1x1.convolution
    assert head.in_channels == last.out_channels == head.weight.shape[1]
    assert sk.count_parameters(elastic, chosen) == sum(p.numel() for p in small.parameters())
    for training in (False, True):
        elastic.train(training), small.train(training)
        for module in (*elastic.modules(), *small.modules()):
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with sk.active(elastic, chosen):
            torch.testing.assert_close(elastic(X).logits, small(X).logits, rtol=1e-4, atol=1e-5)


def test_nothing_outside_is_read_or_written(elastic):
    chosen = sk.Submodel(depth=5, width=6)
    sizes = {}
    with sk.active(elastic, chosen):
        for module in _active(elastic):
            for name, shape in module.active_shapes().items():
                sizes[id(module._parameters.get(name))] = shape
    outside = {}
    with torch.no_grad():
        for name, param in elastic.named_parameters():
            mask = torch.ones_like(param, dtype=torch.bool)
            if id(param) in sizes:
                mask[prefix(sizes[id(param)])] = False
            outside[name] = mask
            param[mask] = torch.nan
    before = {name: param.detach().clone() for name, param in elastic.named_parameters()}
    optimizer = sk.optim.AdamW(elastic.parameters(), lr=0.01)
    sk.activate(elastic, chosen)
    elastic.train()
    elastic(X).logits.square().sum().backward()
    optimizer.step()
    moved = 0
    for name, param in elastic.named_parameters():
        mask = outside[name]
        assert_same_bits(param[mask], before[name][mask])
        assert torch.isfinite(param[~mask]).all(), name
        moved += int((param[~mask] != before[name][~mask]).sum())
    assert moved > 0.9 * sk.count_parameters(elastic, chosen)


def _active(model):
    from sorted_kernels.models.export import active_modules
    from sorted_kernels.nn.layers import ElasticModule

    return [m for m in active_modules(model) if isinstance(m, ElasticModule)]


def test_a_half_width_checkpoint_loads_in_transformers_alone(elastic, tmp_path):
    chosen = sk.Submodel(width=5)
    with sk.active(elastic, chosen):
        expected = elastic(X).logits
    sk.export(elastic, chosen).save_pretrained(tmp_path)
    torch.save({"x": X, "y": expected}, tmp_path / "case.pt")
    code = (
        "import sys, torch, transformers\n"
        "case = torch.load(sys.argv[1] + '/case.pt')\n"
        "model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1])\n"
        "difference = (model.eval()(case['x']).logits - case['y']).abs().max().item()\n"
        "assert 'sorted_kernels' not in sys.modules\n"
        "print(difference, model.config.depth_multiplier)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    difference, multiplier = result.stdout.split()
    assert float(difference) < 1e-4
    assert float(multiplier) == 0.25


def test_recalibrated_statistics_are_exported(elastic, tmp_path):
    chosen = sk.Submodel(width=5)
    before = {k: v.clone() for k, v in elastic.state_dict().items()}
    sk.inference.recalibrate(
        elastic, chosen, [(torch.randn(8, 1, 32, 32), None)] * 2,
        forward=lambda model, x: model(x).logits,
    )  # fmt: skip
    with sk.active(elastic, chosen):
        expected = elastic(X).logits
    small = sk.export(elastic, chosen)
    torch.testing.assert_close(small(X).logits, expected, rtol=1e-4, atol=1e-5)
    assert set(small.state_dict()) == set(before)
    uncalibrated = mobilenet.plain()
    assert (sk.export(sk.elasticize(uncalibrated), chosen)(X).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("sizes", [{"depth": 15}, {"width": 1}, {"depth": 3, "width": 5}])
def test_what_the_configuration_cannot_say_is_no_checkpoint(elastic, sizes, tmp_path):
    chosen = sk.Submodel(**sizes)
    small = sk.export(elastic, chosen)
    with pytest.raises(sk.DimensionError, match="MobileNetV2Config cannot say"):
        small.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    again = pickle.loads(pickle.dumps(small))  # but as a module it can be kept
    with sk.active(elastic, chosen):
        torch.testing.assert_close(again(X).logits, elastic(X).logits, rtol=1e-4, atol=1e-5)


def test_the_body_alone():
    model = mobilenet.plain("MobileNetV2Model")
    before = model(X).pooler_output
    sk.elasticize(model)
    torch.testing.assert_close(model(X).pooler_output, before)
    chosen = sk.Submodel(depth=4, width=3)
    small = sk.export(model, chosen)
    with sk.active(model, chosen):
        torch.testing.assert_close(model(X).pooler_output, small(X).pooler_output)


def test_a_segmentation_model_is_refused():
    config = transformers.MobileNetV2Config(**mobilenet.OPTIONS)
    model = transformers.MobileNetV2ForSemanticSegmentation(config)
    keys = {type(m) for m in model.modules()}
    with pytest.raises(sk.RuleError, match="segmentation_head|no rules"):
        sk.elasticize(model)
    assert {type(m) for m in model.modules()} == keys


def test_listed_sizes():
    layer = sk.nn.Linear(6, 10, out_dim=("width", (2, 2, 7, 10)))
    sk.nn.activation.forget_plan(layer)
    layer.dimensions = {"width": 4}
    for width, size in ((1, 2), (2, 2), (3, 7), (4, 10)):
        sk.activate(layer, sk.Submodel(width=width))
        assert layer(torch.randn(3, 6)).shape == (3, size)
    for sizes in ((2, 9), (5, 3, 10), (0, 10)):
        with pytest.raises(sk.ShapeError, match="rise to 10"):
            sk.nn.Linear(6, 10, out_dim=("width", sizes))
    layer.dimensions = {"width": 5}
    sk.nn.activation.forget_plan(layer)
    with pytest.raises(sk.DimensionError, match="lists 4 sizes"):
        sk.activate(layer, sk.Submodel(width=2))


def test_listed_sizes_of_groups():
    conv = sk.nn.Conv2d(12, 24, 3, groups=6, in_dim=("width", (2, 6, 12)))
    conv.dimensions = {"width": 3}
    sk.activate(conv, sk.Submodel(width=2))
    assert conv(torch.randn(1, 6, 5, 5)).shape == (1, 12, 3, 3)
    with pytest.raises(sk.OptionError, match="same whole groups"):
        sk.nn.Conv2d(12, 24, 3, groups=6, in_dim=("width", (3, 6, 12)))
    with pytest.raises(sk.OptionError, match="same whole groups"):
        sk.nn.Conv2d(
            12, 24, 3, groups=6, in_dim=("width", (2, 6, 12)), out_dim=("width", (4, 8, 24))
        )
