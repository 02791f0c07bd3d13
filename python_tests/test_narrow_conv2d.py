"""Compiled convolutions of few channels on the CPU: against float64, and what they leave alone."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.grad import conv2d_input, conv2d_weight

from sorted_kernels.ops import conv2d_ops, narrow_conv2d
from sorted_kernels.ops.library import load_compiled
from sorted_kernels.reference import conv2d as reference
from sorted_kernels.reference.conv2d import Geometry
from support.conv import Conv, pair
from support.oracle import assert_within_twice
from support.poison import assert_same_bits, pattern

pytestmark = pytest.mark.skipif(not load_compiled(), reason="the compiled library is absent")

# Rows of less than a vector, of some vectors, of one and a bit; channels around a tile's four.
CASES = {
    "one": Conv(full=(9, 9), active=(1, 1), kernel=1, stride=2, size=(1, 1), batch=1),
    "stem": Conv(full=(16, 3), active=(4, 3), padding=1, size=(32, 32), batch=9),
    "vectors": Conv(full=(9, 9), active=(5, 4), padding=1, size=(9, 33)),
    "short": Conv(full=(16, 16), active=(16, 16), padding=1, size=(8, 8), batch=3),
    "strided": Conv(full=(9, 9), active=(8, 3), stride=2, padding=1, size=(16, 33)),
    "strides": Conv(full=(9, 9), active=(3, 7), kernel=(3, 5), stride=(3, 2), size=(11, 40)),
    "shortcut": Conv(full=(9, 9), active=(7, 3), kernel=1, stride=2, size=(7, 35)),
    "dilated": Conv(full=(9, 9), active=(2, 5), dilation=(2, 3), padding=2, size=(9, 20)),
    "strided-dilated": Conv(full=(9, 9), active=(6, 2), dilation=3, stride=2, size=(15, 40)),
    "more-padding-than-taps": Conv(full=(9, 9), active=(3, 2), padding=5, size=(4, 12)),
    "padding-alone-strided": Conv(full=(9, 9), active=(3, 2), stride=4, padding=5, size=(4, 12)),
    "cropped": Conv(full=(9, 9), active=(3, 6), kernel=7, taps=3, padding=1, size=(6, 17)),
    "pixels-left-over": Conv(full=(9, 9), active=(5, 5), stride=3, kernel=2, size=(12, 28)),
    "unlike": Conv(full=(70, 9), active=(64, 2), padding=1, size=(5, 7)),
    "many-images": Conv(full=(9, 9), active=(5, 3), padding=1, size=(3, 5), batch=67),
    "largest-kernel": Conv(full=(9, 9), active=(2, 2), kernel=8, padding=4, size=(9, 19)),
    "no-images": Conv(full=(9, 9), active=(2, 2), padding=1, batch=0),
}  # fmt: skip
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def geometry(case):
    return Geometry(pair(case.stride), pair(case.padding), pair(case.dilation), 1)


def amid_nan(values):
    """The same values in one piece, with NaN on either side."""
    buffer = torch.full((values.numel() + 64,), torch.nan)
    buffer[32:-32] = values.flatten()
    return buffer[32:-32].view(values.shape)


def check(case):
    """Each product against float64, from blocks amid NaN into blocks amid a pattern."""
    x, blocks = case.input(torch.float32), case.blocks(torch.float32)
    dy, options = case.upstream(x), (*map(pair, case.options.values()),)
    parents = {name: p[case.part(name)] for name, p in case.parents(blocks).items()}
    (w, bias), g = (parents["weight"], parents["bias"]), geometry(case)
    assert narrow_conv2d.is_narrow(x, w, g)
    assert_same_bits(w.contiguous(), blocks["weight"])

    def exact(function, *arguments):
        wide = (a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
        return function(*wide, *options)

    x_alone, dy_alone = amid_nan(x), amid_nan(dy)
    y, _ = narrow_conv2d.conv2d(x_alone, w, bias, g, "none", False)
    inputs = x, blocks["weight"], blocks["bias"]
    assert_within_twice(y, F.conv2d(*inputs, *options), exact(F.conv2d, *inputs), "y")

    dx = narrow_conv2d.conv2d_dgrad(dy_alone, w, case.size, g)
    inputs = x.shape, blocks["weight"], dy
    assert_within_twice(dx, conv2d_input(*inputs, *options), exact(conv2d_input, *inputs), "dx")

    inputs = x, blocks["weight"].shape, dy
    plain, wanted = conv2d_weight(*inputs, *options), exact(conv2d_weight, *inputs)
    for accumulate in (False, True):
        parent = pattern(case.full_shape, torch.float32)
        before = parent.clone()
        out = parent[case.where]
        start = before[case.where] * accumulate
        narrow_conv2d.conv2d_wgrad_into(dy_alone, x_alone, out, g, accumulate)
        assert_within_twice(out, plain + start, wanted + start.double(), "dw")
        parent[case.where] = before[case.where]
        assert_same_bits(parent, before)


@by_case
def test_each_product(case):
    check(case)


@settings(max_examples=40, deadline=None)
@given(
    active=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 40)),
    batch=st.integers(1, 4),
)
def test_any_sizes(active, **sizes):
    case = Conv(full=(18, 19), active=active, **sizes)
    reach = [d * (k - 1) + 1 for d, k in zip(case.dilation, case.kernel, strict=True)]
    larger = [max(s, r) for s, r in zip(case.size, reach, strict=True)]
    case = replace(case, size=tuple(larger))
    w = torch.empty(case.block_shape)
    if narrow_conv2d.is_narrow(case.input(torch.float32), w, geometry(case)):
        check(case)


@pytest.mark.parametrize("most", ["default", "avx2"])
def test_with_fewer_instructions(most):
    """PyTorch's setting chooses the loops: a process has one."""
    here = Path(__file__)
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t\n"
    code += "import torch; torch.manual_seed(0)\nfor case in t.CASES.values(): t.check(case)"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": most}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_sums_do_not_depend_on_the_threads():
    case = CASES["stem"]
    x = case.input(torch.float32)
    w, dy, g = torch.randn(case.block_shape), case.upstream(x), geometry(case)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty_like(w)
            narrow_conv2d.conv2d_wgrad_into(dy, x, out, g, False)
            y = narrow_conv2d.conv2d(x, w, None, g, "none", False)[0]
            dx = narrow_conv2d.conv2d_dgrad(dy, w, case.size, g)
            found.append((out, y, dx))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert_same_bits(other, one)


@pytest.mark.parametrize(
    ("active", "options", "narrow"),
    [
        ((15, 15), {}, True),
        ((15, 17), {}, True),
        ((16, 16), {}, False),
        ((16, 16), {"size": (9, 8)}, True),
        ((17, 17), {"size": (9, 8)}, False),
        ((64, 1), {}, True),
        ((65, 1), {}, False),
        ((4, 4), {"kernel": 1}, False),  # a product
        ((4, 4), {"kernel": 1, "stride": 2}, True),
        ((4, 4), {"kernel": (9, 8)}, False),
    ],
)
def test_where_it_is_taken(active, options, narrow):
    case = Conv(**{"full": (99, 99), "active": active, "size": (9, 9), **options})
    w, g = torch.randn(case.full_shape)[case.where], geometry(case)
    x = case.input(torch.float32)
    taken = narrow_conv2d if narrow else reference
    assert conv2d_ops.module_of(w, g, x) is taken
    for other in (x.double(), x.bfloat16(), x.transpose(2, 3)):
        assert conv2d_ops.module_of(w, g, other) is reference
    assert conv2d_ops.module_of(w, g, x, x.transpose(2, 3)) is reference
    assert conv2d_ops.module_of(w, replace(g, groups=2), x) is reference


def test_what_the_ops_refuse():
    x, w, g = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3), [1, 1, 0, 0, 1, 1, 1, 1]
    y = torch.full((1, 3, 2, 2), 7.0)
    forward = torch.ops.sorted_kernels.narrow_conv2d_
    for message, arguments in {
        "contiguous": (x.transpose(2, 3), w, None, g, y, False),
        "float32": (x.double(), w, None, g, y, False),
        "4 axes": (x[0], w, None, g, y, False),
        "N, Ci, H, W": (x, w[:, :1], None, g, y, False),
        "at least 3": (x, w, torch.randn(2), g, y, False),
        "8": (x, w, None, g[:6], y, False),
        "at least 1": (x, w, None, [0, *g[1:]], y, False),
        "must be 1": (x, w, None, [2, 1, 0, 0, 1, 1, 2, 1], y, False),
        "beyond": (torch.randn(1, 2, 2, 4), w, None, g, torch.empty(1, 3, 0, 2), False),
        "64": (torch.randn(1, 2, 9, 9), torch.randn(3, 2, 9, 8), None, g, y, False),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    assert (y == 7).all()
