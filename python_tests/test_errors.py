"""Wrong calls: each raises the documented error, naming argument, value and what is allowed."""

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels import errors
from support.routes import in_place_routes, take

X, W, B = torch.randn(2, 3), torch.randn(5, 4), torch.randn(5)
IDX = torch.tensor([0, 1])
META = {"device": "meta"}


def linear(**options):
    arguments = {"x": X, "weight": W, "bias": B, **options}
    return lambda: sk.linear(
        arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments
    )


def norm(kind, **options):
    arguments = {"x": X, "weight": torch.ones(4), **options}
    return lambda: getattr(sk, kind)(arguments.pop("x"), **arguments)


def embedding(indices=IDX, weight=W, **options):
    return lambda: sk.embedding(indices, weight, **options)


def conv(**options):
    arguments = {"x": torch.randn(2, 3, 6, 5), "weight": torch.randn(6, 4, 3, 3), **options}
    return lambda: sk.conv2d(arguments.pop("x"), arguments.pop("weight"), **arguments)


def grouped(channels, **options):
    return conv(x=torch.randn(1, channels, 5, 5), weight=torch.randn(6, 2, 3, 3), **options)


def conv_layer(x=None, active=None, **options):
    def call():
        layer = sk.nn.Conv2d(4, 6, 3, **options)
        if active is not None:
            sk.activate(layer, active)
        layer(torch.randn(1, 4, 5, 5) if x is None else x)

    return call


def space(**options):
    return lambda: sk.SubmodelSpace(**options)


def of(listed, **options):
    return lambda: sk.SubmodelSpace.of(listed, **options)


def optimizer(kind, **options):
    return lambda: getattr(sk.optim, kind)([torch.nn.Parameter(W.clone())], **options)


def step_of(param, grad=None):
    def call():
        param.grad = torch.ones_like(param) if grad is None else grad
        sk.optim.AdamW([param]).step()

    return call


def layer_input(layer, x):
    return lambda: layer(x)


def replaced_gradient():
    layer = sk.nn.Linear(4, 3)
    layer.weight.grad = torch.zeros(4, 3).t()
    layer(torch.ones(1, 4)).sum().backward()


def half(tensor):
    return tensor.half()


CASES = {
    # linear
    "out_features=0": (linear(out_features=0), sk.ShapeError, r"out_features=0 is not in 1\.\.5"),
    "out_features=6": (linear(out_features=6), sk.ShapeError, r"out_features=6 is not in 1\.\.5"),
    "out_features=-1": (linear(out_features=-1), sk.ShapeError, r"out_features=-1"),
    "out_features=0.5": (
        linear(out_features=0.5), sk.ShapeError, r"out_features=0\.5 .*not a ratio",
    ),
    "out_features=True": (linear(out_features=True), sk.ShapeError, "out_features=True"),
    "linear-wide-x": (
        linear(x=torch.randn(2, 5)), sk.ShapeError, r"x has 5 features; weight.* has 4",
    ),
    "linear-scalar-x": (linear(x=torch.tensor(1.0)), sk.ShapeError, r"x has shape \(\)"),
    "linear-empty-x": (linear(x=torch.randn(2, 0)), sk.ShapeError, r"x has shape \(2, 0\)"),
    "linear-weight-3d": (linear(weight=torch.randn(5, 4, 1)), sk.ShapeError, r"3 axes.*2 wanted"),
    "linear-weight-1d": (linear(weight=torch.randn(4)), sk.ShapeError, r"weight has 1 axes"),
    "linear-weight-0d": (linear(weight=torch.tensor(1.0)), sk.ShapeError, r"weight has 0 axes"),
    "linear-bias-2d": (linear(bias=torch.randn(5, 1)), sk.ShapeError, r"bias has 2 axes"),
    "linear-bias-short": (linear(bias=torch.randn(4)), sk.ShapeError, r"bias has 4 elements"),
    "linear-weight-dtype": (
        linear(weight=half(W)), sk.DTypeError, r"weight has dtype torch\.float16, the input .*32",
    ),
    "linear-bias-dtype": (linear(bias=half(B)), sk.DTypeError, r"bias has dtype torch\.float16"),
    "linear-integer-x": (linear(x=X.long()), sk.DTypeError, r"x has dtype torch\.int64; allowed"),
    "linear-complex-x": (linear(x=X.cfloat()), sk.DTypeError, r"x has dtype torch\.complex64"),
    "linear-weight-device": (
        linear(weight=torch.empty(5, 4, **META)), sk.DeviceError, "weight is on meta, .*on cpu",
    ),
    "linear-bias-device": (
        linear(bias=torch.empty(5, **META)), sk.DeviceError, "bias is on meta, the input on cpu",
    ),
    "linear-weight-stride": (
        linear(weight=torch.randn(4, 5).t()), sk.StrideError, r"weight has strides \(1, 5\)",
    ),
    "linear-bias-stride": (
        linear(bias=torch.randn(10)[::2]), sk.StrideError, r"bias has strides \(2,\)",
    ),
    "linear-activation": (
        linear(activation="tanh"), sk.OptionError, "activation='tanh'; allowed are none, relu",
    ),
    # norms
    **{
        f"{kind}-{name}": (norm(kind, **options), error, message)
        for kind in ("layer_norm", "rms_norm")
        for name, options, error, message in (
            ("wide-x", {"x": torch.randn(2, 5)}, sk.ShapeError, "x has 5 features; weight has 4"),
            ("scalar-x", {"x": torch.tensor(1.0)}, sk.ShapeError, r"x has shape \(\)"),
            ("empty-x", {"x": torch.randn(2, 0)}, sk.ShapeError, r"x has shape \(2, 0\)"),
            ("integer-x", {"x": X.int()}, sk.DTypeError, r"x has dtype torch\.int32; allowed"),
            ("weight-2d", {"weight": W}, sk.ShapeError, "weight has 2 axes"),
            ("weight-dtype", {"weight": torch.ones(4).half()}, sk.DTypeError, "weight has dtype"),
            ("weight-device", {"weight": torch.ones(4, **META)}, sk.DeviceError, "is on meta"),
            ("weight-stride", {"weight": torch.ones(8)[::2]}, sk.StrideError, "weight has strides"),
        )
    },
    "layer_norm-bias-2d": (norm("layer_norm", bias=W), sk.ShapeError, "bias has 2 axes"),
    "layer_norm-bias-short": (
        norm("layer_norm", bias=torch.ones(2)), sk.ShapeError, "x has 3 features; bias has 2",
    ),
    "layer_norm-bias-dtype": (
        norm("layer_norm", bias=torch.ones(4).half()), sk.DTypeError, "bias has dtype",
    ),
    # convolution
    "conv-out_channels=0": (conv(out_channels=0), sk.ShapeError, r"=0 is not in 1\.\.6"),
    "conv-out_channels=7": (conv(out_channels=7), sk.ShapeError, r"=7 is not in 1\.\.6"),
    "conv-out_channels=.5": (conv(out_channels=0.5), sk.ShapeError, "not a ratio"),
    "conv-channels": (
        conv(x=torch.randn(1, 5, 4, 4)), sk.ShapeError, r"x has 5 channels; weight takes 1\.\.4",
    ),
    "conv-x-2d": (conv(x=torch.randn(3, 4)), sk.ShapeError, r"\(3, 4\); \(N, C, H, W\) or"),
    "conv-x-5d": (conv(x=torch.randn(1, 1, 3, 4, 4)), sk.ShapeError, r"\(N, C, H, W\) or"),
    "conv-x-integer": (conv(x=torch.ones(1, 3, 4, 4).int()), sk.DTypeError, "torch.int32; allowed"),
    "conv-x-no-pixels": (conv(x=torch.randn(1, 3, 0, 4), padding=1), sk.ShapeError, "height 0"),
    "conv-x-no-channels": (conv(x=torch.randn(1, 0, 4, 4)), sk.ShapeError, "x has 0 channels"),
    "conv-x-small": (
        conv(x=torch.randn(1, 3, 4, 2)), sk.ShapeError, "width 2.* the kernel reaches over 3",
    ),
    "conv-weight-2d": (conv(weight=W), sk.ShapeError, "weight has 2 axes.*4 wanted"),
    "conv-weight-stride": (
        conv(weight=torch.randn(6, 4, 3, 3).transpose(2, 3)),
        sk.StrideError, "weight has strides",
    ),
    "conv-weight-dtype": (conv(weight=torch.ones(6, 4, 3, 3).half()), sk.DTypeError, "float16"),
    "conv-weight-device": (
        conv(weight=torch.empty(6, 4, 3, 3, **META)), sk.DeviceError, "weight is on meta",
    ),
    "conv-bias-2d": (conv(bias=W), sk.ShapeError, "bias has 2 axes"),
    "conv-bias-short": (conv(bias=torch.ones(5)), sk.ShapeError, "bias has 5 elements, fewer"),
    "conv-bias-dtype": (conv(bias=torch.ones(6).half()), sk.DTypeError, "bias has dtype"),
    "conv-activation": (conv(activation="tanh"), sk.OptionError, "activation='tanh'; allowed"),
    "conv-stride=0": (conv(stride=0), sk.ShapeError, "stride=0 is below 1"),
    "conv-stride-three": (conv(stride=(1, 1, 1)), sk.ShapeError, r"stride=\(1, 1, 1\) must be"),
    "conv-dilation=0": (conv(dilation=(1, 0)), sk.ShapeError, r"dilation=\(1, 0\) is below 1"),
    "conv-dilation-float": (conv(dilation=1.0), sk.ShapeError, "dilation=1.0 must be an integer"),
    "conv-padding=-1": (conv(padding=-1), sk.ShapeError, "padding=-1 is below 0"),
    "conv-padding-name": (conv(padding="full"), sk.OptionError, "padding='full'; allowed are"),
    "conv-padding-stride": (
        conv(padding="same", stride=2), sk.OptionError, r"needs stride 1, not \(2, 2\)",
    ),
    "conv-kernel=4": (conv(kernel_size=4), sk.ShapeError, r"\(4, 4\) is not the centre"),
    "conv-kernel=2": (conv(kernel_size=2), sk.ShapeError, "an even number of taps"),
    "conv-kernel=0": (conv(kernel_size=0), sk.ShapeError, "kernel_size=0 is below 1"),
    "conv-groups=0": (grouped(2, groups=0), sk.ShapeError, r"groups=0 is not in 1\.\.6"),
    "conv-groups=4": (grouped(2, groups=4), sk.ShapeError, "groups=4 does not divide weight's 6"),
    "conv-part-of-group": (grouped(3, groups=3), sk.ShapeError, "3 channels; .* groups of 2, up"),
    "conv-many-groups": (grouped(8, groups=3), sk.ShapeError, "8 channels; .* up to 3 of them"),
    "conv-group-outputs": (
        grouped(4, groups=3, out_channels=5), sk.ShapeError, "2 of 3 groups, which give 4",
    ),
    # layers of convolutions
    "Conv2d-channels": (
        conv_layer(torch.randn(1, 3, 5, 5)), sk.ShapeError, r"Conv2d got x .* is 4 of 4",
    ),
    "Conv2d-active-channels": (
        conv_layer(active=sk.Submodel(i=2), in_dim="i"), sk.ShapeError, "2 of 4 .dimension 'i'",
    ),
    "Conv2d-vector": (conv_layer(torch.randn(4, 5)), sk.ShapeError, "Conv2d got x of shape"),
    "Conv2d-dtype": (conv_layer(torch.randn(1, 4, 5, 5).double()), sk.DTypeError, "float64"),
    "Conv2d-small": (conv_layer(torch.randn(1, 4, 2, 5)), sk.ShapeError, "height 2"),
    "Conv2d-padding": (
        conv_layer(active=sk.Submodel(k=1), kernel_size_dim="k"), sk.ShapeError,
        r"kernel_size=\(1, 1\) of \(3, 3\) needs more than padding=\(0, 0\)",
    ),
    "Conv2d-valid": (
        conv_layer(active=sk.Submodel(k=1), kernel_size_dim="k", padding="valid"), sk.ShapeError,
        "needs more than padding='valid'",
    ),
    "Conv2d-reflect": (
        conv_layer(padding_mode="reflect"), sk.OptionError, "'reflect'; elastic is 'zeros' alone",
    ),
    "Conv2d-activation": (conv_layer(activation="tanh"), sk.OptionError, "tanh'; allowed are"),
    "Conv2d-grad_mode": (conv_layer(grad_mode="x"), sk.OptionError, "grad_mode='x'"),
    "Conv2d-kernel-multiple": (
        conv_layer(kernel_size_dim=("k", 2)), sk.OptionError, "odd or even, not multiples",
    ),
    "Conv2d-oblong": (
        lambda: sk.nn.Conv2d(4, 6, (3, 1), kernel_size_dim="k"), sk.OptionError, "is not square",
    ),
    "Conv2d-two-dimensions": (
        conv_layer(groups=2, in_dim="i", out_dim="o"), sk.OptionError, "they are one dimension",
    ),
    "Conv2d-multiple": (conv_layer(in_dim=("i", 5)), sk.ShapeError, r"multiple_of=5 is not in"),
    # embedding
    "features=0": (embedding(features=0), sk.ShapeError, r"features=0 is not in 1\.\.4"),
    "features=5": (embedding(features=5), sk.ShapeError, r"features=5 is not in 1\.\.4"),
    "features=1.0": (embedding(features=1.0), sk.ShapeError, r"features=1\.0 must be an integer"),
    "padding_idx=5": (embedding(padding_idx=5), sk.ShapeError, r"padding_idx=5 is not in -5\.\.4"),
    "padding_idx=-6": (embedding(padding_idx=-6), sk.ShapeError, r"padding_idx=-6"),
    "float-indices": (embedding(IDX.float()), sk.DTypeError, r"indices has dtype .*int64"),
    "embedding-weight-1d": (embedding(weight=B), sk.ShapeError, "weight has 1 axes"),
    "embedding-weight-integer": (embedding(weight=W.int()), sk.DTypeError, "weight has dtype"),
    "embedding-weight-stride": (
        embedding(weight=torch.randn(4, 5).t()), sk.StrideError, "weight has strides",
    ),
    "embedding-weight-device": (
        embedding(weight=torch.empty(5, 4, **META)), sk.DeviceError, "weight is on meta",
    ),
    # layers
    "layer-width": (
        layer_input(sk.nn.Linear(4, 3, in_dim="w"), X), sk.ShapeError,
        r"Linear got x of shape \(2, 3\).* 4 of 4 \(dimension 'w'\)",
    ),
    "layer-width-fixed": (
        layer_input(sk.nn.LayerNorm(4), X), sk.ShapeError, r"LayerNorm got .* 4 of 4 \(not",
    ),
    "layer-dtype": (
        layer_input(sk.nn.Linear(3, 3), X.half()), sk.DTypeError, "weight has dtype torch.float32",
    ),
    "layer-norm-dtype": (
        layer_input(sk.nn.LayerNorm(3, dtype=torch.float16), X), sk.DTypeError, "weight has dtype",
    ),
    "layer-activation": (
        lambda: sk.nn.Linear(3, 3, activation="tanh"), sk.OptionError, "activation='tanh'",
    ),
    "layer-grad-mode": (
        lambda: sk.nn.Linear(3, 3, grad_mode="sparse"), sk.OptionError,
        "grad_mode='sparse'; allowed are inplace, dense",
    ),
    "multiple-of": (
        lambda: sk.nn.Linear(3, 3, in_dim=("w", 4)), sk.ShapeError, r"multiple_of=4 is not in 1",
    ),
    "norm-of-two-axes": (
        lambda: sk.nn.RMSNorm((3, 4)), sk.ShapeError, r"normalized_shape=\(3, 4\).*one axis",
    ),
    "gradient-stride": (replaced_gradient, sk.StrideError, r"param\.grad has strides \(1, 3\)"),
    # sub-models and spaces
    "submodel-empty": (lambda: sk.Submodel(), sk.DimensionError, "at least one dimension"),
    "submodel-zero": (lambda: sk.Submodel(w=0), sk.DimensionError, "'w' is 0; .*at least 1"),
    "submodel-negative": (lambda: sk.Submodel(w=-3), sk.DimensionError, "'w' is -3"),
    "submodel-ratio": (lambda: sk.Submodel(w=0.5), sk.DimensionError, r"'w' is 0\.5"),
    "submodel-bool": (lambda: sk.Submodel(w=True), sk.DimensionError, "'w' is True"),
    "submodel-text": (lambda: sk.Submodel(w="3"), sk.DimensionError, "'w' is '3'"),
    "submodel-replace": (lambda: sk.Submodel(w=3).replace(w=0), sk.DimensionError, "'w' is 0"),
    "space-empty": (space(), sk.SpaceError, "empty: give at least one dimension"),
    "space-no-sizes": (space(w=[]), sk.SpaceError, "'w' has no sizes"),
    "space-one-number": (space(w=3), sk.SpaceError, "'w' is 3; .* as a list"),
    "space-twice": (space(w=[3, 1, 3]), sk.SpaceError, r"'w' names a size twice: \[3, 1, 3\]"),
    "space-zero": (space(w=[0, 1]), sk.DimensionError, "'w' is 0"),
    "space-weights-name": (
        space(w=[1, 2], weights={"w": "linear"}), sk.SpaceError, "'linear' are unknown; .*'uni",
    ),
    "space-weights-ratio": (
        space(w=[1, 2], weights={"w": "geometric:2"}), sk.SpaceError, "'geometric:2' .*RATIO <= 1",
    ),
    "space-weights-no-ratio": (
        space(w=[1, 2], weights={"w": "geometric:x"}), sk.SpaceError, "'geometric:x' are unknown",
    ),
    "space-weights-uniform-ratio": (
        space(w=[1, 2], weights={"w": "uniform:2"}), sk.SpaceError, "'uniform:2' are unknown",
    ),
    "space-weights-length": (
        space(w=[1, 2], weights={"w": [1]}), sk.SpaceError, "1 weights were given for 2 sizes",
    ),
    "space-weights-negative": (
        space(w=[1, 2], weights={"w": [1, -1]}), sk.SpaceError, r"\[1\.0, -1\.0\] must be finite",
    ),
    "space-weights-zero": (
        space(w=[1, 2], weights={"w": [0, 0]}), sk.SpaceError, "not all zero",
    ),
    "space-weights-nan": (
        space(w=[1, 2], weights={"w": [1, float("nan")]}), sk.SpaceError, "must be finite",
    ),
    "space-weights-unknown": (
        space(w=[1, 2], weights={"v": "uniform"}), sk.DimensionError, r"\['v'\]; there are \['w'\]",
    ),
    "of-empty": (of([]), sk.SpaceError, "no sub-model"),
    "of-twice": (of([sk.Submodel(w=1)] * 2), sk.SpaceError, "a sub-model twice"),
    "of-mixed": (
        of([sk.Submodel(w=1), sk.Submodel(v=1)]), sk.SpaceError, r"\['v'\], others \['w'\]",
    ),
    "of-weights": (of([sk.Submodel(w=1)], weights=[1, 2]), sk.SpaceError, "2 weights .* 1 sizes"),
    "activate-unknown": (
        lambda: sk.activate(sk.nn.Linear(4, 3, in_dim="w"), sk.Submodel(v=1)), sk.DimensionError,
        r"'v' is unknown here; the model has \['w'\]",
    ),
    "activate-too-large": (
        lambda: sk.activate(sk.nn.Linear(4, 3, in_dim="w"), sk.Submodel(w=5)), sk.DimensionError,
        r"w=5 is not in 1\.\.4",
    ),
    # optimizers
    **{
        f"{kind}-{name}": (optimizer(kind, **options), sk.OptionError, message)
        for kind in ("AdamW", "SGD")
        for name, options, message in (
            ("update", {"update": "some"}, "update='some'; allowed are active, whole"),
            ("lr", {"lr": -1.0}, r"lr=-1\.0 must be at least 0"),
            ("lr-nan", {"lr": float("nan")}, "lr=nan"),
            ("decay", {"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        )
    },
    "betas": (optimizer("AdamW", betas=(0.9, 1.0)), sk.OptionError, r"betas=\(0\.9, 1\.0\) must"),
    "eps": (optimizer("AdamW", eps=-1.0), sk.OptionError, r"eps=-1\.0"),
    "momentum": (optimizer("SGD", momentum=1.0), sk.OptionError, r"momentum=1\.0 .*\[0, 1\)"),
    "nesterov": (optimizer("SGD", nesterov=True), sk.OptionError, "needs a momentum above 0"),
    "complex-parameter": (
        step_of(torch.nn.Parameter(W.cfloat())), sk.DTypeError, r"dtype torch\.complex64; allowed",
    ),
    "sparse-gradient": (
        step_of(torch.nn.Parameter(W.clone()), W.to_sparse()), sk.DTypeError, "torch.sparse_coo",
    ),
    "transposed-parameter": (
        step_of(torch.nn.Parameter(torch.randn(4, 5).t())), sk.StrideError, r"strides \(1, 5\)",
    ),
    "transposed-kernel-parameter": (
        step_of(
            torch.nn.Parameter(torch.randn(2, 3, 4, 4).transpose(1, 2))
        ),
        sk.StrideError, "that are contiguous",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_call(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: sk.nn.Linear(3, 3), X.double()),
        (lambda: sk.nn.LayerNorm(3), X.double()),
        (lambda: sk.nn.RMSNorm(3), X.double()),
    ],
    ids=["linear", "layer_norm", "rms_norm"],
)
@in_place_routes
def test_layers_check_on_every_route(layer, x, route, monkeypatch):
    take(monkeypatch, route)
    with pytest.raises(sk.DTypeError, match="weight has dtype torch.float32"):
        layer()(x)


@pytest.mark.parametrize("value", ["numpy", "cudnn"])
def test_unknown_backend(value, monkeypatch):
    from sorted_kernels.ops import backend

    monkeypatch.setenv("SORTED_KERNELS_BACKEND", value)
    with pytest.raises(sk.OptionError, match=f"SORTED_KERNELS_BACKEND='{value}'; allowed are auto"):
        backend.choose("linear", "cpu")


def test_switches_are_checked(monkeypatch):
    from sorted_kernels import env

    for value, expected in {"1": True, "yes": True, "ON": True, "0": False, "": False}.items():
        monkeypatch.setenv("SORTED_KERNELS_EXPERIMENTAL", value)
        assert env.experimental() is expected
    monkeypatch.setenv("SORTED_KERNELS_EXPERIMENTAL", "maybe")
    with pytest.raises(sk.OptionError, match="SORTED_KERNELS_EXPERIMENTAL='maybe' is not a switch"):
        env.experimental()


def test_every_error_is_one_of_the_library_and_of_python():
    """Callers can catch them as ours, or as the built-in error that they are a case of."""
    for name in sk.__all__:
        value = getattr(sk, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, sk.SortedKernelsError), name
            builtin = (ValueError, TypeError, RuntimeError, ImportError)
            assert value is sk.SortedKernelsError or issubclass(value, builtin), name
    assert issubclass(sk.DTypeError, TypeError) and issubclass(sk.ShapeError, ValueError)


def test_a_missing_package_names_the_extra():
    with pytest.raises(sk.DependencyError, match=r"'no_such_package'.*sorted_kernels\[plot\]"):
        errors.require("no_such_package.inner", "plot")
