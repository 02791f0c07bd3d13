"""Triton cross-entropy under a linear head against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

import sorted_kernels as sk  # noqa: E402
from sorted_kernels.ops import backend  # noqa: E402
from sorted_kernels.reference import linear_cross_entropy as reference  # noqa: E402
from sorted_kernels.triton import linear_cross_entropy as ours  # noqa: E402
from support.triton_numerics import (  # noqa: E402
    DEVICE,
    DTYPES,
    Patterned,
    assert_accurate,
    dtype_id,
    poisoned,
    randn,
)

IGNORED = -100
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def random_targets(rows, words, seed=5):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(words, (rows,), generator=generator)
    target[::4] = IGNORED
    return target.to(DEVICE)


def padded(logits):
    """The same logits in rows that go on with NaN up to a multiple of 64, as a chunk's do."""
    rows, words = logits.shape
    width = -(-words // ours.ROW_MULTIPLE) * ours.ROW_MULTIPLE
    return poisoned(logits, rows + 1, width)


def check_chunk(dtype, rows, words, smoothing, scaled, gradient=True):
    logits = randn(rows, words, dtype=dtype, seed=1, scale=3)
    target = random_targets(rows, words)
    scale = randn(rows, dtype=torch.float32, seed=2) if scaled else None
    wide = None if scale is None else scale.double()
    parent, same, oracle = padded(logits), logits.clone(), logits.double()
    mine = parent[:rows, :words]
    options = (IGNORED, smoothing, gradient)
    losses = ours.cross_entropy_(mine, target, scale, *options)
    same_losses = reference.cross_entropy_(same, target, scale, *options)
    oracle_losses = reference.cross_entropy_(oracle, target, wide, *options)
    assert losses.dtype == torch.float32
    kept = target != IGNORED
    assert_accurate(losses, same_losses, oracle_losses)
    assert not losses[~kept].any()
    assert parent[rows:].isnan().all()  # the next row's memory
    if gradient:
        assert not mine[~kept].any()
        assert_accurate(mine[kept], same[kept], oracle[kept])
    else:
        assert torch.equal(mine, logits)


@by_dtype
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    words=st.integers(1, 150),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    scaled=st.booleans(),
    gradient=st.booleans(),
)
def test_any_size(dtype, rows, words, smoothing, scaled, gradient):
    check_chunk(dtype, rows, words, smoothing, scaled, gradient)


@by_dtype
@pytest.mark.parametrize("words", [4095, 4096, 4097, 49152])
def test_vocabularies_of_several_blocks(dtype, words):
    check_chunk(dtype, 3, words, 0.1, True)


def test_extreme_logits():
    """Masked words, and logits whose exponentials float32 does not have."""
    logits = randn(4, 70, dtype=torch.float32, seed=1)
    logits[0, 10:60] = float("-inf")
    logits[1] += 300
    logits[2, 5], logits[3, :] = 1e4, -1e30
    target = torch.tensor([3, 69, 5, 0], device=DEVICE)
    mine, oracle = padded(logits)[:4, :70], logits.double()
    losses = ours.cross_entropy_(mine, target, None, IGNORED, 0.0, True)
    expected = reference.cross_entropy_(oracle, target, None, IGNORED, 0.0, True)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.double(), oracle, rtol=1e-4, atol=1e-5)


def test_targets_outside_the_vocabulary_are_nan_and_read_nothing():
    logits = randn(3, 70, dtype=torch.float32, seed=1)
    mine = padded(logits)[:3, :70]
    target = torch.tensor([1, 70, -1], device=DEVICE)
    losses = ours.cross_entropy_(mine, target, None, IGNORED, 0.0, True)
    assert losses.isnan().tolist() == [False, True, True]
    assert mine.isnan().all(1).tolist() == [False, True, True]


def test_strided_targets_and_scales():
    logits = randn(6, 70, dtype=torch.float32, seed=1)
    target, scale = random_targets(12, 70).int()[::2], randn(12, dtype=torch.float32, seed=2)[::2]
    mine, same = padded(logits)[:6, :70], logits.clone()
    losses = ours.cross_entropy_(mine, target, scale, IGNORED, 0.1, True)
    expected = reference.cross_entropy_(same, target, scale, IGNORED, 0.1, True)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(mine, same)


def test_no_rows():
    empty = torch.empty(0, 64, device=DEVICE)
    target = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert ours.cross_entropy_(empty, target, None, IGNORED, 0.0, True).shape == (0,)


def check_whole(dtype, words, k, bias, accumulate):
    """All gradients, in the prefix of buffers; the weight is NaN past its first k columns."""
    rows, full = 11, k + 5
    hidden, target = randn(rows, k, dtype=dtype, seed=1), random_targets(rows, words)
    block = randn(words, k, dtype=dtype, seed=2)
    shift = randn(words, dtype=dtype, seed=3) if bias else None
    scale = randn(rows, dtype=torch.float32, seed=4)
    dw, db = Patterned((words + 2, full), (words, k), dtype), Patterned((words,), (words,), dtype)

    def run(module, weight, change, dx, *grads):
        values = (hidden, weight, shift)
        values = [None if t is None else change(t) for t in values]
        places = reference.Gradients(dx, grads[0], grads[1] if bias else None, (accumulate,) * 2)
        scaled = scale.double() if dx.dtype == torch.float64 else scale
        losses = module.linear_cross_entropy(*values, target, scaled, IGNORED, 0.1, places)
        return losses, dx, *(grads if bias else grads[:1])

    mine = run(ours, poisoned(block, words, full), torch.Tensor.contiguous,
               torch.empty_like(hidden), dw.view, db.view)  # fmt: skip
    same = run(reference, block, torch.Tensor.contiguous,
               torch.empty_like(hidden), dw.start.clone(), db.start.clone())  # fmt: skip
    oracle = run(reference, block, torch.Tensor.double,
                 hidden.double(), dw.start.double(), db.start.double())  # fmt: skip
    for three in zip(mine, same, oracle, strict=True):
        assert_accurate(*three)
    dw.assert_rest_intact()
    assert bias or torch.equal(db.full, db.before)


@by_dtype
@pytest.mark.parametrize("bias, accumulate", [(True, False), (False, True), (True, True)])
def test_whole_op(dtype, bias, accumulate, monkeypatch):
    for words, k in ((67, 13), (64, 16), (1, 1)):
        check_whole(dtype, words, k, bias, accumulate)
    monkeypatch.setitem(reference.CHUNK_BYTES, DEVICE, 1)
    monkeypatch.setattr(reference, "MIN_ROWS", 4)
    check_whole(dtype, 67, 13, bias, accumulate)


@pytest.fixture
def triton_chosen(monkeypatch):
    monkeypatch.setenv("SORTED_KERNELS_BACKEND", "triton")
    backend.reset()
    yield
    monkeypatch.undo()
    backend.reset()


@pytest.mark.parametrize("grad_mode", ["inplace", "dense"])
@pytest.mark.parametrize("exits", [1, 3])
def test_a_layer_is_served_by_this_kernel(triton_chosen, monkeypatch, grad_mode, exits):
    """Forward, backward and the gradients' place, with this back end chosen."""
    launched = []
    launch = ours.launch
    monkeypatch.setattr(
        ours, "launch", lambda *args, **kw: (launched.append(kw["GRADIENT"]), launch(*args, **kw))
    )
    head = sk.nn.Linear(9, 67, in_dim="width", grad_mode=grad_mode, device=DEVICE)
    sk.activate(head, sk.Submodel(width=6))
    hidden = randn(exits, 10, 6, dtype=torch.float32, seed=1).requires_grad_()
    target, dy = random_targets(20, 67)[::2], torch.arange(1.0, exits + 1, device=DEVICE)
    sk.nn.LinearCrossEntropy(head, label_smoothing=0.1)(hidden, target).backward(dy)
    assert launched == ([True] if exits == 1 else [True, True])
    wide = [t.detach().double() for t in (hidden, head.weight[:, :6], head.bias)]
    leaves = [t.requires_grad_() for t in wide]
    sk.linear_cross_entropy(
        leaves[0], leaves[1], target, bias=leaves[2], label_smoothing=0.1
    ).backward(dy.double())
    found = (hidden.grad, head.weight.grad[:, :6], head.bias.grad)
    for mine, exact in zip(found, leaves, strict=True):
        torch.testing.assert_close(mine.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert not head.weight.grad[:, 6:].any()
