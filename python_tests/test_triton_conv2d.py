"""Triton convolution: all gradients against float64, in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

pytest.importorskip("triton", reason="Triton is not installed")

import sorted_kernels as sk  # noqa: E402
from sorted_kernels.ops import backend  # noqa: E402
from sorted_kernels.reference import conv2d as reference  # noqa: E402
from sorted_kernels.reference.conv2d import Geometry  # noqa: E402
from sorted_kernels.reference.linear import ACTIVATIONS, activate  # noqa: E402
from sorted_kernels.triton import (  # noqa: E402
    conv2d,
    conv_bias_grad,
    conv_config,
    conv_wgrad,
    depthwise,
)
from sorted_kernels.triton.gemm_config import config_supports  # noqa: E402
from sorted_kernels.triton.launch import DeviceLimits  # noqa: E402
from support.triton_numerics import (  # noqa: E402
    DEVICE,
    DTYPES,
    assert_accurate,
    dtype_id,
    inside,
    randn,
)

LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@dataclass(frozen=True)
class Case:
    """A convolution of x (images, channels, *size) with a part of a larger weight.

    ``crop`` is how much larger the stored kernel is than the active one, on all sides.
    """

    images: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    geometry: Geometry
    crop: int = 0

    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.channels // self.geometry.groups, *self.kernel)

    def options(self) -> tuple:
        g = self.geometry
        return g.stride, g.padding, g.dilation, g.groups


def geometry(stride=1, padding=0, dilation=1, groups=1) -> Geometry:
    def pair(n):
        return n if isinstance(n, tuple) else (n, n)

    return Geometry(pair(stride), pair(padding), pair(dilation), groups)


CASES = {
    "dense": Case(2, 5, 7, (6, 5), (3, 3), geometry(padding=1)),
    "dense-aligned": Case(2, 16, 32, (5, 6), (3, 3), geometry(padding=1)),
    "strided": Case(2, 5, 7, (7, 6), (3, 3), geometry(2, 1)),
    "strided-aligned": Case(1, 48, 16, (6, 7), (3, 3), geometry(2, 1)),
    "stride-above-kernel": Case(2, 3, 4, (7, 8), (2, 2), geometry(3)),
    "dilated": Case(1, 4, 3, (9, 8), (3, 3), geometry((1, 2), (2, 3), (2, 3))),
    "stride-shares-factor-with-dilation": Case(1, 3, 4, (9, 9), (3, 3), geometry(2, 2, 2)),
    "oblong": Case(1, 3, 4, (4, 9), (1, 4), geometry((2, 1), (0, 2))),
    "cropped": Case(2, 6, 5, (6, 5), (3, 3), geometry(padding=1), crop=1),
    "cropped-aligned": Case(1, 16, 16, (4, 5), (3, 3), geometry(padding=1), crop=1),
    "grouped": Case(2, 6, 8, (6, 5), (3, 3), geometry(padding=1, groups=2)),
    "grouped-aligned": Case(1, 32, 32, (4, 4), (3, 3), geometry(2, 1, groups=2)),
    "channel-multiplier": Case(2, 3, 6, (5, 5), (3, 3), geometry(padding=1, groups=3)),
    "depthwise": Case(2, 5, 5, (6, 7), (3, 3), geometry(padding=1, groups=5)),
    "depthwise-aligned": Case(1, 16, 16, (3, 4), (3, 3), geometry(2, 1, groups=16)),
    "depthwise-cropped": Case(1, 3, 3, (5, 6), (5, 5), geometry((2, 1), 2, 1, 3), crop=1),
    "pointwise": Case(2, 7, 5, (3, 4), (1, 1), geometry()),
    "pointwise-cropped": Case(2, 7, 5, (3, 4), (1, 1), geometry(), crop=1),
    "pointwise-strided": Case(2, 7, 5, (5, 4), (1, 1), geometry(2)),
    "one-element": Case(1, 1, 1, (1, 1), (1, 1), geometry()),
    "one-pixel": Case(2, 3, 4, (1, 1), (3, 3), geometry(padding=1)),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Parent:
    """A buffer that holds a weight's active view: leading channels, centre of the kernel."""

    def __init__(
        self, values: Tensor, crop: int, fill: float | None, layout=torch.contiguous_format
    ):
        out, channels, height, width = values.shape
        shape = (out + 3, channels + 2, height + 2 * crop, width + 2 * crop)
        self.full = randn(*shape, dtype=values.dtype, seed=99).to(memory_format=layout)
        if fill is not None:
            self.full.fill_(fill)
        self._window = (
            slice(out), slice(channels), slice(crop, crop + height), slice(crop, crop + width)
        )  # fmt: skip
        self.view = self.full[self._window]
        if fill is not None:
            self.view.copy_(values)
        self.before = self.full.clone(memory_format=torch.preserve_format)

    @property
    def start(self) -> Tensor:
        return self.before[self._window]

    def assert_rest_intact(self) -> None:
        expected = self.before.clone(memory_format=torch.preserve_format)
        expected[self._window] = self.view
        bits = torch.int16 if self.full.itemsize == 2 else torch.int32
        assert torch.equal(self.full.view(bits), expected.view(bits))


def tensors(case: Case, dtype, layout) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight's values and dy."""
    x = randn(case.images, case.channels, *case.size, dtype=dtype, seed=1).to(memory_format=layout)
    depth = x.shape[1] // case.geometry.groups * case.kernel[0] * case.kernel[1]
    w = randn(*case.weight_shape(), dtype=dtype, seed=2, scale=depth**-0.5)
    y = F.conv2d(x, w, None, *case.options())
    dy = randn(*y.shape, dtype=dtype, seed=4, scale=(y.numel() / y.shape[1]) ** -0.5)
    return x, w, dy.to(memory_format=layout)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether strides agree, but for axes of one element."""
    return conv_config.strides_of(a) == conv_config.strides_of(b)


def check_forward(case, dtype, layout, activation="gelu", weight_layout=None, config=None):
    x, values, _ = tensors(case, dtype, layout)
    bias = randn(case.out_channels, dtype=dtype, seed=3)
    weight = Parent(values, case.crop, torch.nan, weight_layout or torch.contiguous_format)
    y, z = conv2d.conv2d(
        x, weight.view, inside(bias, torch.nan), case.geometry, activation, True, config=config
    )
    same, _ = reference.conv2d(x, values, bias, case.geometry, activation, True)
    oracle_z = F.conv2d(x.double(), values.double(), bias.double(), *case.options())
    assert y.dtype == dtype and same_layout(y, same)
    assert_accurate(y, same, activate(oracle_z, activation))
    if activation in ("gelu", "silu"):
        same_z, _ = reference.conv2d(x, values, bias, case.geometry, "none", False)
        assert_accurate(z, same_z, oracle_z)
    else:
        assert z.shape == (0,)


def check_backward(case, dtype, layout, accumulate, weight_layout=None, config=None):
    x, values, dy = tensors(case, dtype, layout)
    weight_layout = weight_layout or torch.contiguous_format
    weight = Parent(values, case.crop, torch.nan, weight_layout)
    dx = conv2d.conv2d_dgrad(dy, weight.view, case.size, case.geometry, config=config)
    same = reference.conv2d_dgrad(dy, values, case.size, case.geometry)
    wide = (x.double(), values.double(), dy.double())
    assert dx.dtype == dtype and same_layout(dx, same)
    assert_accurate(dx, same, conv2d_input(x.shape, *wide[1:], *case.options()))

    grad = Parent(values, case.crop, None, weight_layout)
    same = grad.start.clone()
    oracle = conv2d_weight(wide[0], values.shape, wide[2], *case.options())
    conv2d.conv2d_wgrad_into(dy, x, grad.view, case.geometry, accumulate, config=config)
    reference.conv2d_wgrad_into(dy, x, same, case.geometry, accumulate)
    assert_accurate(grad.view, same, oracle + accumulate * grad.start.double())
    grad.assert_rest_intact()


def check_bias_grad(dy: Tensor, accumulate: bool):
    buffer = randn(dy.shape[1] + 5, dtype=dy.dtype, seed=5)
    before, grad = buffer.clone(), buffer[2:-3]
    same, oracle = grad.clone(), dy.double().sum((0, 2, 3)) + accumulate * grad.double()
    conv2d.bias_grad_into(dy, grad, accumulate)
    reference.bias_grad_into(dy, same, accumulate)
    assert_accurate(grad, same, oracle)
    assert torch.equal(buffer[:2], before[:2]) and torch.equal(buffer[-3:], before[-3:])


@by_case
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)],
    ids=["float32-contiguous", "bfloat16-channels_last"],
)
def test_every_kind(dtype, layout, case):
    check_forward(case, dtype, layout)
    check_backward(case, dtype, layout, accumulate=True)
    check_bias_grad(tensors(case, dtype, layout)[2], accumulate=True)


@by_dtype
def test_depthwise_of_several_blocks_of_channels(dtype):
    channels = 96 if dtype == torch.float32 else 70
    case = Case(1, channels, channels, (2, 3), (1, 2), geometry((1, 2), 0, 1, channels))
    check_forward(case, dtype, torch.channels_last)
    check_backward(case, dtype, torch.channels_last, accumulate=True)


@pytest.mark.parametrize("kind", ["dense-aligned", "grouped", "depthwise"])
def test_overwriting_gradients(kind):
    check_backward(CASES[kind], torch.float32, torch.channels_last, accumulate=False)
    for layout in LAYOUTS.values():
        check_bias_grad(tensors(CASES[kind], torch.float32, layout)[2], accumulate=False)


@pytest.mark.parametrize(
    "kind", ["dense-aligned", "cropped-aligned", "grouped", "pointwise-cropped"]
)
@by_layout
def test_weights_stored_channels_last(layout, kind):
    """Parents that are dense along input channels: the flag for vector loads of the weight."""
    check_forward(CASES[kind], torch.float32, layout, "silu", torch.channels_last)
    check_backward(CASES[kind], torch.float32, layout, True, torch.channels_last)


@pytest.mark.parametrize("kind", ["pointwise", "depthwise"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, kind):
    check_forward(CASES[kind], torch.bfloat16, torch.channels_last, activation)
    x, w, _ = tensors(CASES[kind], torch.bfloat16, torch.channels_last)
    _, z = conv2d.conv2d(x, w, None, CASES[kind].geometry, activation, False)
    assert z.shape == (0,)


@pytest.mark.parametrize("kind", ["dense", "dense-aligned"])
@by_dtype
def test_every_tiling(dtype, kind):
    case = replace(CASES[kind], images=1, size=(3, 4))
    for config in conv_config.all_conv_configs(dtype, kind == "dense-aligned"):
        check_forward(case, dtype, torch.channels_last, config=config)
        check_backward(case, dtype, torch.channels_last, True, config=config)


@pytest.mark.parametrize("kind", ["strided", "dense-aligned", "depthwise"])
@pytest.mark.parametrize("channels_last", [False, True], ids=LAYOUTS)
def test_activations_cut_out_of_larger_buffers(channels_last, kind):
    case = CASES[kind]
    x, w, dy = tensors(case, torch.float32, torch.contiguous_format)

    def cut(values: Tensor) -> Tensor:
        if channels_last:
            return inside(values.permute(0, 2, 3, 1), torch.nan).permute(0, 3, 1, 2)
        return inside(values, torch.nan)

    y, _ = conv2d.conv2d(cut(x), w, None, case.geometry, "none", False)
    plain, _ = conv2d.conv2d(x, w, None, case.geometry, "none", False)
    torch.testing.assert_close(y, plain)
    dx = conv2d.conv2d_dgrad(cut(dy), w, case.size, case.geometry)
    torch.testing.assert_close(dx, conv2d.conv2d_dgrad(dy, w, case.size, case.geometry))
    grad, plain = torch.zeros_like(w), torch.zeros_like(w)
    conv2d.conv2d_wgrad_into(cut(dy), cut(x), grad, case.geometry, True)
    conv2d.conv2d_wgrad_into(dy, x, plain, case.geometry, True)
    torch.testing.assert_close(grad, plain)
    check_bias_grad(cut(dy), True)


def test_expanded_gradient():
    """As the backward of ``y.sum()`` hands it over."""
    for kind in ("dense", "depthwise", "pointwise"):
        case = CASES[kind]
        x, w, dy = tensors(case, torch.float32, torch.contiguous_format)
        ones = torch.ones((), device=DEVICE).expand(dy.shape)
        dx = conv2d.conv2d_dgrad(ones, w, case.size, case.geometry)
        oracle = conv2d_input(x.shape, w.double(), ones.double(), *case.options())
        assert_accurate(dx, reference.conv2d_dgrad(ones, w, case.size, case.geometry), oracle)
        check_bias_grad(ones, True)


@pytest.mark.parametrize("kind", ["dense", "dense-aligned", "grouped-aligned", "depthwise"])
@by_layout
def test_gradients_in_several_parts(monkeypatch, layout, kind):
    """Pixels are cut into parts where a weight has few tiles; their sum has a fixed order."""
    monkeypatch.setattr(conv_wgrad, "MIN_PIXELS", 16)
    monkeypatch.setattr(depthwise, "MIN_PIXELS", 16)
    limits = DeviceLimits(multiprocessors=200, shared_memory=99 * 1024)
    for module in (conv_wgrad, depthwise):
        monkeypatch.setattr(module, "device_limits", lambda device: limits)
    monkeypatch.setattr(depthwise, "_tile", lambda elements, cols, dense: (16, 16 if dense else 1))
    case = replace(CASES[kind], images=9 if kind == "grouped-aligned" else 1)
    counts, parts_of = [], conv_wgrad.parts_of

    def counted(out, count):
        counts.append(count)
        return parts_of(out, count).fill_(torch.nan)

    monkeypatch.setattr(conv_wgrad, "parts_of", counted)
    monkeypatch.setattr(depthwise, "parts_of", counted)
    for accumulate in (True, False):
        check_backward(case, torch.float32, layout, accumulate)
    assert len(counts) == 2 and min(counts) > 1


def test_bias_gradient_of_many_pixels_takes_two_stages():
    dy = randn(3, 3, 50, 60, dtype=torch.float32, seed=1, scale=0.02)
    assert dy[:, 0].numel() > conv_bias_grad.MIN_PIXELS
    check_bias_grad(dy, True)
    check_bias_grad(dy, False)


def test_float32_gradient_of_bfloat16_operands():
    case = CASES["dense"]
    x, w, dy = tensors(case, torch.bfloat16, torch.channels_last)
    grad = Parent(w.float(), 0, None)
    conv2d.conv2d_wgrad_into(dy, x, grad.view, case.geometry, True)
    same = grad.start + conv2d_weight(x.float(), w.shape, dy.float(), *case.options())
    oracle = grad.start + conv2d_weight(x.double(), w.shape, dy.double(), *case.options())
    assert_accurate(grad.view, same, oracle)
    grad.assert_rest_intact()


@pytest.mark.parametrize("kind", ["dense", "dense-aligned", "grouped", "depthwise", "pointwise"])
def test_prefix_view_and_copy_agree_bitwise(kind):
    case = CASES[kind]
    x, values, dy = tensors(case, torch.float16, torch.channels_last)
    view = Parent(values, 1, torch.nan).view
    for copy in (values.contiguous(), values.to(memory_format=torch.channels_last)):
        y, _ = conv2d.conv2d(x, view, None, case.geometry, "silu", False)
        assert torch.equal(y, conv2d.conv2d(x, copy, None, case.geometry, "silu", False)[0])
        dx = conv2d.conv2d_dgrad(dy, view, case.size, case.geometry)
        assert torch.equal(dx, conv2d.conv2d_dgrad(dy, copy, case.size, case.geometry))


@by_layout
def test_no_images(layout):
    x = torch.empty(0, 5, 6, 7, device=DEVICE).to(memory_format=layout)
    for kind in ("dense", "depthwise", "pointwise"):
        case = CASES[kind]
        x = torch.empty(0, case.channels, *case.size, device=DEVICE).to(memory_format=layout)
        w = randn(*case.weight_shape(), dtype=torch.float32, seed=1)
        y, z = conv2d.conv2d(x, w, None, case.geometry, "gelu", True)
        assert y.shape == z.shape == F.conv2d(x, w, None, *case.options()).shape
        assert conv2d.conv2d_dgrad(y, w, case.size, case.geometry).shape == x.shape
        grad = Parent(w, 1, None)
        conv2d.conv2d_wgrad_into(y, x, grad.view, case.geometry, True)
        assert torch.equal(grad.view, grad.start)
        conv2d.conv2d_wgrad_into(y, x, grad.view, case.geometry, False)
        assert not grad.view.any()
        grad.assert_rest_intact()
        bias = torch.ones(case.out_channels, device=DEVICE)
        conv2d.bias_grad_into(y, bias, True)
        assert bias.eq(1).all()
        conv2d.bias_grad_into(y, bias, False)
        assert not bias.any()


@pytest.fixture
def triton_chosen(monkeypatch):
    monkeypatch.setenv("SORTED_KERNELS_BACKEND", "triton")
    backend.reset()
    yield
    monkeypatch.undo()
    backend.reset()


@pytest.mark.parametrize("grad_mode", ["inplace", "dense"])
@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depthwise"])
def test_a_layer_is_served_by_these_kernels(triton_chosen, monkeypatch, groups, grad_mode):
    """Forward, backward and the gradients' place, with this back end chosen."""
    launched = []
    for name in ("conv2d", "conv2d_dgrad", "conv2d_wgrad_into", "bias_grad_into"):
        function = getattr(conv2d, name)
        monkeypatch.setattr(
            conv2d, name, lambda *args, f=function: (launched.append(f.__name__), f(*args))[1]
        )
    layer = sk.nn.Conv2d(
        6, 6, 5, 2, 2, groups=groups, in_dim="width", out_dim="width", kernel_size_dim="taps",
        activation="silu", grad_mode=grad_mode, device=DEVICE,
    )  # fmt: skip
    sk.activate(layer, sk.Submodel(width=4, taps=3))
    x = randn(2, 4, 6, 5, dtype=torch.float32, seed=1).requires_grad_()
    y = layer(x)
    dy = randn(*y.shape, dtype=torch.float32, seed=2)
    y.backward(dy)
    assert {"conv2d", "conv2d_dgrad", "conv2d_wgrad_into"} <= set(launched)

    channels = 4 if groups == 1 else 1
    block = layer.weight.detach()[:4, :channels, 1:-1, 1:-1].double().requires_grad_()
    bias = layer.bias.detach()[:4].double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    right = F.silu(F.conv2d(wide, block, bias, 2, 1, groups=1 if groups == 1 else 4))
    right.backward(dy.double())
    grad = torch.zeros_like(layer.weight)
    grad[:4, :channels, 1:-1, 1:-1] = block.grad
    for actual, exact in (
        (y, right), (x.grad, wide.grad), (layer.weight.grad, grad), (layer.bias.grad[:4], bias.grad)
    ):  # fmt: skip
        torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=1e-5)


SMALL = DeviceLimits(multiprocessors=84, shared_memory=99 * 1024)
HOPPER = DeviceLimits(multiprocessors=132, shared_memory=227 * 1024, large_tiles=True)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("limits", [SMALL, HOPPER], ids=["sm_86", "sm_90"])
@by_dtype
def test_tilings_of_every_shape_are_supported(dtype, limits, aligned):
    for extents in ((1, 1, 1), (64, 64, 16), (100_000, 32, 288), (100_000, 512, 4608)):
        configs = conv_config.conv_configs(extents, dtype, limits, aligned)
        assert configs
        assert all(config_supports(config, dtype, limits, aligned) for config in configs)


def test_tiles_are_no_wider_than_the_channels_and_fill_the_gpu():
    def chosen(rows, cols, depth):
        configs = conv_config.conv_configs((rows, cols, depth), torch.bfloat16, HOPPER, True)
        config = conv_config.choose_conv_config(configs, rows, cols, 1, HOPPER)
        return config.block_m, config.block_n, config.block_k

    assert chosen(100_000, 256, 256) == (128, 128, 64)
    assert chosen(100_000, 48, 64) == (128, 64, 64)
    assert chosen(100_000, 16, 16) == (64, 32, 32)
    assert chosen(1_000, 256, 256)[0] == 64
