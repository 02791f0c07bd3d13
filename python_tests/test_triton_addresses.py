"""Triton kernels touch the active blocks and nothing else: every address is checked."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference.conv2d import Geometry  # noqa: E402
from sorted_kernels.triton import conv2d, embedding, layer_norm, linear  # noqa: E402
from sorted_kernels.triton.gemm_config import HALF_CONFIGS  # noqa: E402
from support.triton_numerics import DEVICE, AddressWatch  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows addresses")

MARGIN = 300  # more than the largest tile, so that no overhang leaves the buffer unseen


def cut_out(*sizes: int, dtype=torch.float16, margin: int = MARGIN) -> torch.Tensor:
    parent = torch.ones([size + 2 * margin for size in sizes], dtype=dtype)
    return parent[tuple(slice(margin, margin + size) for size in sizes)]


@pytest.mark.parametrize("config", HALF_CONFIGS, ids=lambda c: f"{c.block_m}x{c.block_n}")
@pytest.mark.parametrize(
    ("n", "m", "k"), [(1, 1, 1), (33, 17, 65), (70, 80, 144), (130, 127, 257), (130, 129, 255)]
)
def test_linear(monkeypatch, config, n, m, k):
    x, dy, weight, grad = cut_out(n, k), cut_out(n, m), cut_out(m, k), cut_out(m, k)
    bias, bias_grad = cut_out(m), cut_out(m)
    watch = AddressWatch(x=x, dy=dy, weight=weight, grad=grad, bias=bias, bias_grad=bias_grad)
    watch.install(monkeypatch)
    linear.linear(x, weight, bias, m, "gelu", True, config=config)
    linear.linear_dgrad(dy, weight, k, config=config)
    linear.linear_wgrad_into(dy, x, grad, True, config=config)
    linear.bias_grad_into(dy, bias_grad, True)
    assert watch.touched == {"x", "dy", "weight", "grad", "bias", "bias_grad"}


@pytest.mark.parametrize(
    ("channels", "out", "groups"),
    [(16, 32, 1), (5, 7, 1), (6, 4, 2), (16, 16, 16), (5, 5, 5)],
    ids=["aligned", "odd", "grouped", "depthwise-aligned", "depthwise-odd"],
)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_conv2d(monkeypatch, channels_last, channels, out, groups):
    """Margins are multiples of 16, so that aligned channels stay aligned."""

    def images(count, channels, height, width):
        if channels_last:
            return cut_out(count, height, width, channels, margin=16).permute(0, 3, 1, 2)
        return cut_out(count, channels, height, width, margin=16)

    g = Geometry((2, 1), (1, 1), (1, 2), groups)
    x, dy = images(2, channels, 4, 5), images(2, out, 2, 3)
    weight, grad = (cut_out(out, channels // groups, 3, 3, margin=16) for _ in range(2))
    bias, bias_grad = cut_out(out), cut_out(out)
    watch = AddressWatch(x=x, dy=dy, weight=weight, grad=grad, bias=bias, bias_grad=bias_grad)
    watch.install(monkeypatch)
    conv2d.conv2d(x, weight, bias, g, "gelu", True)
    conv2d.conv2d_dgrad(dy, weight, (4, 5), g)
    conv2d.conv2d_wgrad_into(dy, x, grad, g, True)
    conv2d.bias_grad_into(dy, bias_grad, True)
    assert watch.touched == {"x", "dy", "weight", "grad", "bias", "bias_grad"}


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 63), (3, 5000)])
def test_norm(monkeypatch, n, k):
    x, dy = cut_out(n, k), cut_out(n, k)
    weight, bias, weight_grad, bias_grad = (cut_out(k) for _ in range(4))
    watch = AddressWatch(
        x=x, dy=dy, weight=weight, bias=bias, weight_grad=weight_grad, bias_grad=bias_grad
    )
    watch.install(monkeypatch)
    _, mean, rstd = layer_norm.layer_norm(x, weight, bias, 1e-5)
    layer_norm.layer_norm_backward_into(
        dy, x, mean, rstd, weight, weight_grad, bias_grad, True, True
    )
    assert watch.touched == {"x", "dy", "weight", "bias", "weight_grad", "bias_grad"}


@pytest.mark.parametrize("k", [1, 63, 300])
def test_embedding(monkeypatch, k):
    weight, grad, dy = cut_out(11, k), cut_out(11, k), cut_out(20, k)
    indices = torch.arange(20) % 13 - 1  # two of them outside the table
    watch = AddressWatch(weight=weight, grad=grad, dy=dy)
    watch.install(monkeypatch)
    embedding.embedding(indices, weight, k)
    embedding.embedding_backward_into(dy, indices, grad, True)
    assert watch.touched == {"weight", "grad", "dy"}
