"""Triton's attention against the float64 definition: masks, groups, heads a sample, addresses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

import sorted_kernels as sk  # noqa: E402
from sorted_kernels.ops import backend  # noqa: E402
from sorted_kernels.triton import attention, attention_tile  # noqa: E402
from sorted_kernels.triton.attention_config import (  # noqa: E402
    AttentionConfig,
    AttentionConfigs,
    block_of,
    choose_configs,
)
from sorted_kernels.triton.launch import DeviceLimits  # noqa: E402
from support.attention import PROBLEMS, Problem, exact, outcome, plain, poison_inactive, wide  # noqa: E402
from support.oracle import assert_within_twice  # noqa: E402
from support.poison import assert_same_bits, in_larger_buffer  # noqa: E402
from support.triton_numerics import DEVICE, DTYPES, AddressWatch, dtype_id  # noqa: E402

SMALL = AttentionConfigs(*[AttentionConfig(16, 16, 4, 1)] * 3)
OBLONG = AttentionConfigs(
    AttentionConfig(32, 16, 4, 1), AttentionConfig(32, 16, 4, 1), AttentionConfig(16, 32, 4, 1)
)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def of(p, **changes):
    """A problem with heads that the kernels take, and more rows than a tile."""
    sizes = {"head_dim": 32, "rows": p.rows % 20 + 12, "cols": p.cols % 20 + 12}
    return dataclasses.replace(p, **{**sizes, **changes})


def solve(tensors, mask, p, configs=None, counts_type=torch.int64):
    """y, dq, dk, dv of the kernels."""
    q, k, v, dy = (t.to(DEVICE) for t in tensors)
    if mask is not None:
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape).to(DEVICE)
    counts = None
    if isinstance(p.counts, tuple):
        counts = torch.tensor(p.counts, dtype=counts_type, device=DEVICE)
    elif p.counts is not None:
        n, kv = p.counts, p.counts // p.group
        q, k, v, dy = q[:, :n], k[:, :kv], v[:, :kv], dy[:, :n]
        mask = mask if mask is None or mask.shape[1] == 1 else mask[:, :n]
    options = (mask, counts)
    rule = (p.causal, p.factor)
    out, lse = attention.attention(q, k, v, *options, *rule, configs=configs)
    found = attention.attention_backward(dy, q, k, v, *options, out, lse, *rule, configs=configs)
    return [t.cpu() for t in (out, *found)]


def check(p, dtype, configs=SMALL, change=lambda t: t, **options):
    tensors, mask = p.tensors(dtype), p.make_mask(dtype)
    given = [change(t) for t in poison_inactive(tensors, p)]
    found = solve(given, mask, p, configs, **options)
    right = outcome(exact, [t.double() for t in tensors], wide(mask), p)
    torchs = outcome(plain, tensors, mask, p)
    for what, mine, theirs, oracle in zip(
        ("y", "dq", "dk", "dv"), found, torchs, right, strict=True
    ):
        active = mine.shape[1]
        assert mine.transpose(1, 2).is_contiguous(), "as projections want it"
        assert_within_twice(mine, theirs[:, :active], oracle[:, :active], f"{p} {what}")
        for b, heads in enumerate(p.each):
            assert not mine[b, heads if what in ("y", "dq") else heads // p.group :].any(), what


@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=lambda i: PROBLEMS[i].name)
def test_matches_the_definition_with_poison_in_inactive_heads(index):
    p = PROBLEMS[index]
    p = of(p, rows=1, cols=1) if p.name == "one" else of(p)
    check(p, DTYPES[index % 3], OBLONG)


@by_dtype
@pytest.mark.parametrize("head_dim", [33, 128])
def test_head_sizes(head_dim, dtype):
    check(Problem("features", 1, 2, rows=21, cols=37, head_dim=head_dim, mask="bool"), dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize(
    "sizes", [(1, 1), (1, 40), (40, 1), (16, 16), (17, 31), (33, 64), (48, 15)]
)
def test_sizes_around_the_tiles(sizes, causal):
    p = Problem("edges", 1, 1, rows=sizes[0], cols=sizes[1], head_dim=32, causal=causal)
    for configs in (SMALL, OBLONG):
        check(p, torch.float32, configs)


@by_dtype
def test_the_chosen_tilings(dtype):
    check(Problem("tiles", 1, 1, rows=150, cols=200, head_dim=64, causal=True), dtype, None)


def test_the_counts_type_and_layouts():
    p = Problem("each", 2, 2, rows=9, cols=17, head_dim=32, counts=(2, 1), mask="bool")
    check(p, torch.float32, counts_type=torch.int32)
    check(p, torch.float32, change=in_larger_buffer)
    *tensors, dy = p.tensors(torch.float32)
    flat, mask = dy[..., :1].expand_as(dy), p.make_mask(torch.float32)  # no unit inner stride
    expanded, copied = (solve([*tensors, d], mask, p, OBLONG) for d in (flat, flat.clone()))
    for mine, theirs in zip(expanded, copied, strict=True):
        assert_same_bits(mine, theirs)


def test_the_same_bits_each_time_and_of_a_copy():
    p = of(PROBLEMS[4], counts=4)
    tensors = p.tensors(torch.float32)
    first, second = (solve(tensors, None, p, SMALL) for _ in range(2))
    copies = [t[:, :n].clone() for t, n in zip(tensors, (4, 2, 2, 4), strict=True)]
    copied = solve(copies, None, dataclasses.replace(p, heads=4, counts=None), SMALL)
    for a, b, c in zip(first, second, copied, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)


def test_empty_axes():
    for batch, rows, cols in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        p = Problem("empty", batch, 2, rows=rows, cols=cols, head_dim=32)
        tensors = p.tensors(torch.float32)
        for t, like in zip(solve(tensors, None, p), (0, 0, 1, 2), strict=True):
            assert t.shape == tensors[like].shape and not t.any()


@triton.jit
def _list_kernel(seen_ptr, counts_ptr, batch, kv_heads, group, rows, BLOCK: tl.constexpr):
    """Where each program finds itself: sample, head and first row."""
    sample, head, row = attention_tile.head_tile(
        counts_ptr, batch, kv_heads, group, rows, BLOCK, False
    )
    place = seen_ptr + tl.program_id(0) * 3
    tl.store(place, sample)
    tl.store(place + 1, head)
    tl.store(place + 2, row)


@pytest.mark.parametrize(
    ("counts", "kv_heads", "group"),
    [
        ([4, 2, 6, 2], 3, 2), ([1] * 5, 4, 1), ([6, 1, 3], 6, 1), ([3], 1, 3),
        ([i % 2 + 1 for i in range(140)], 2, 1), ([0, 9, -3, 5], 3, 2), (None, 3, 2),
    ],
)  # fmt: skip
def test_tiles_are_those_of_the_active_heads(counts, kv_heads, group):
    """Exactly the sum of heads, each tile once, without gaps: the programs after them do nothing.

    Counts that only the device knows are rounded down to whole groups and cut to what is there.
    """
    heads, rows, block = kv_heads * group, 17, 16
    batch = 4 if counts is None else len(counts)
    given = None if counts is None else torch.tensor(counts, device=DEVICE)
    tiles = batch * heads * 2
    seen = torch.full((tiles, 3), -1, dtype=torch.int32, device=DEVICE)
    _list_kernel[(tiles,)](seen, given, batch, kv_heads, group, rows, BLOCK=block)
    each = [heads] * batch if counts is None else [
        min(max(count // group, 0), kv_heads) * group for count in counts
    ]  # fmt: skip
    expected = [
        [b, h, row] for b, active in enumerate(each) for h in range(active) for row in (0, 16)
    ]
    assert len(expected) == 2 * sum(each)
    assert seen[: len(expected)].tolist() == expected
    assert (seen[len(expected) :, 0] == batch).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows addresses")
@pytest.mark.parametrize("name", ["each-groups", "each-causal", "causal-padding", "columns"])
def test_nothing_else_is_read_or_written(monkeypatch, name):
    p = of(next(p for p in PROBLEMS if p.name == name), head_dim=40, cols=21)
    tensors = [in_larger_buffer(t) for t in p.tensors(torch.float16)]
    mask = p.make_mask(torch.float16)
    watch = AddressWatch(q=tensors[0], k=tensors[1], v=tensors[2], dy=tensors[3])
    watch.install(monkeypatch)
    solve(tensors, mask, p, OBLONG)
    assert watch.touched == {"q", "k", "v", "dy"}


def test_blocks_and_tilings():
    assert [block_of(d) for d in (32, 33, 64, 80, 128)] == [32, 64, 64, 128, 128]
    hopper = DeviceLimits(132, 227 * 1024, large_tiles=True)
    ampere = DeviceLimits(108, 163 * 1024)
    for dtype in DTYPES:
        for head_dim in (32, 64, 100, 128):
            for rows in (False, True):
                for limits in (hopper, ampere):
                    chosen = choose_configs(head_dim, dtype, rows, limits)
                    for config in dataclasses.astuple(chosen):
                        assert all(size & (size - 1) == 0 for size in config[:3])


@pytest.mark.skipif(DEVICE == "cuda", reason="forces Triton on CPU tensors")
@pytest.mark.parametrize("p", [PROBLEMS[2], PROBLEMS[17], PROBLEMS[15], PROBLEMS[21]], ids=str)
def test_the_public_function_takes_the_kernels(monkeypatch, p):
    monkeypatch.setenv("SORTED_KERNELS_BACKEND", "triton")
    backend.reset()
    calls = []
    forward = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *a: calls.append(a) or forward(*a))
    p = of(p)
    tensors, mask = p.tensors(torch.float32), p.make_mask(torch.float32)
    try:
        found = outcome(
            lambda q, k, v, mask, p: sk.attention(
                q, k, v, num_heads=p.num_heads, mask=mask, causal=p.causal
            ),
            tensors, mask, p,
        )  # fmt: skip
    finally:
        monkeypatch.undo()
        backend.reset()
    assert len(calls) == 1
    right = outcome(exact, [t.double() for t in tensors], wide(mask), p)
    for mine, oracle in zip(found, right, strict=True):
        oracle = oracle[:, : mine.shape[1]].float()
        torch.testing.assert_close(mine, oracle, rtol=1e-4, atol=1e-5)
