"""Compiled loops of the cross-entropy on the CPU: against float64, and what they leave alone."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sorted_kernels.ops import compiled_cross_entropy, linear_cross_entropy_ops
from sorted_kernels.ops.backend import reference_only
from sorted_kernels.ops.library import load_compiled
from sorted_kernels.reference import linear_cross_entropy as reference
from support.oracle import DTYPES, assert_within_twice
from support.poison import assert_same_bits, pattern

pytestmark = pytest.mark.skipif(not load_compiled(), reason="the compiled library is absent")

IGNORED = -100
# Vocabularies of a word, around a loop's 64 elements at once, and of several of its 4096.
WORDS = (1, 2, 63, 64, 65, 130, 4095, 4097, 9001)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def rows_of(words, dtype, rows=5):
    """Logits in the middle of a larger buffer, and that buffer."""
    buffer = pattern((rows + 2, words + 7), dtype)
    buffer[1:-1, 3:-4] = (4 * torch.randn(rows, words)).to(dtype)
    return buffer[1:-1, 3:-4], buffer


def check(words, dtype, smoothing, scaled):
    logits, buffer = rows_of(words, dtype)
    target = torch.randint(words, (5,))
    target[3] = IGNORED
    scale = torch.randn(5) if scaled else torch.ones(5)
    before, outcomes = buffer.clone(), []
    mine = compiled_cross_entropy.cross_entropy_(
        logits.clone(), target, scale, IGNORED, smoothing, False
    )
    losses = compiled_cross_entropy.cross_entropy_(
        logits, target, scale if scaled else None, IGNORED, smoothing, True
    )
    assert_same_bits(mine, losses)
    assert losses[3] == 0 and not logits[3].any()
    inner = torch.zeros_like(buffer, dtype=torch.bool)
    inner[1:-1, 3:-4] = True
    assert_same_bits(buffer[~inner], before[~inner])
    values = before[1:-1, 3:-4]
    for convert in (torch.clone, torch.Tensor.double):
        again = convert(values)
        factors = scale.double() if again.dtype == torch.float64 else scale
        found = reference.cross_entropy_(again, target, factors, IGNORED, smoothing, True)
        outcomes.append((found, again))
    (stock_losses, stock), (exact_losses, exact) = outcomes
    assert_within_twice(losses, stock_losses, exact_losses, "losses")
    assert_within_twice(logits, stock, exact, "gradient", terms=1)


@dtypes
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_rows(words, dtype, smoothing):
    torch.manual_seed(0)
    for scaled in (False, True):
        check(words, dtype, smoothing, scaled)


@pytest.mark.parametrize("most", ["default", "avx2"])
def test_with_fewer_instructions(most):
    """PyTorch's setting chooses the loops: a process has one."""
    here = Path(__file__)
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t\n"
    code += "for words in t.WORDS:\n    for dtype in t.DTYPES.values():\n"
    code += "        t.check(words, dtype, 0.3, True); t.check_transposed(dtype)"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": most}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@dtypes
def test_far_logits(dtype):
    """Sure words, words without a chance, and no finite logit at all: as torch has it."""
    wide = torch.randn(6, 100)
    wide[0, 7] = 300.0
    wide[1] -= 3e4
    wide[2, 9] = -math.inf
    wide[3, 5] = math.inf
    wide[4, 50] = math.nan
    wide[5] = -math.inf
    logits, target = wide.to(dtype), torch.tensor([7, 1, 3, 3, 3, 3])
    exact = logits.double()
    losses = compiled_cross_entropy.cross_entropy_(logits, target, None, IGNORED, 0.0, True)
    exact_losses = reference.cross_entropy_(exact, target, None, IGNORED, 0.0, True)
    torch.testing.assert_close(losses.double(), exact_losses, equal_nan=True, rtol=1e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact, equal_nan=True, rtol=2 * eps, atol=2e-7)
    assert logits[3:].isnan().all() and logits[2, 9] == 0


def check_transposed(dtype):
    for rows, cols in ((1, 1), (31, 63), (32, 64), (33, 65), (200, 17), (0, 4), (4, 0)):
        parent = pattern((cols + 2, rows + 5), dtype)
        part = parent[1:-1, 2:-3]
        for accumulate in (False, True):
            buffer = pattern((rows + 2, cols + 9), torch.float32)
            before = buffer.clone()
            expected = before.clone()
            place = expected[1:-1, 4:-5]
            place.copy_(part.T.float() + place if accumulate else part.T.float())
            torch.ops.sorted_kernels.add_transposed_(buffer[1:-1, 4:-5], part, accumulate)
            assert_same_bits(buffer, expected)


@dtypes
def test_add_transposed(dtype):
    check_transposed(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_narrow_product(dtype, monkeypatch):
    torch.manual_seed(2)
    dz, x = torch.randn(9, 70).to(dtype), torch.randn(9, 6).to(dtype)
    exact = dz.double().T @ x.double()
    for module, limit in ((compiled_cross_entropy, "_BLOCK"), (reference, "CACHED_ELEMENTS")):
        monkeypatch.setattr(module, limit, 6 * 32)
        total = torch.full((70, 6), torch.nan)
        for times in (1, 2):
            module.add_narrow_product(total, dz, x, times == 2)
            torch.testing.assert_close(
                total.double(), times * exact, rtol=0.01, atol=10 * torch.finfo(dtype).eps
            )


def test_sums_do_not_depend_on_the_threads():
    torch.manual_seed(3)
    logits, target = torch.randn(9, 40_000).bfloat16(), torch.randint(40_000, (9,))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gradient = logits.clone()
            losses = compiled_cross_entropy.cross_entropy_(
                gradient, target, None, IGNORED, 0.1, True
            )
            total = torch.zeros(40_000, 9)
            torch.ops.sorted_kernels.add_transposed_(total, gradient, True)
            found.append((losses, gradient, total))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert_same_bits(other, one)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64])
def test_where_it_is_taken(dtype, monkeypatch):
    taken = []
    for module in (compiled_cross_entropy, reference):
        run = lambda *args, module=module: taken.append(module)  # noqa: E731
        monkeypatch.setattr(module, "linear_cross_entropy", run)
    arguments = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype), None, torch.tensor([0])
    linear_cross_entropy_ops.losses_of(*arguments, IGNORED, 0.0)
    with reference_only():
        linear_cross_entropy_ops.losses_of(*arguments, IGNORED, 0.0)
    first = reference if dtype == torch.float64 else compiled_cross_entropy
    assert taken == [first, reference]


def test_what_the_ops_refuse():
    logits, target, losses = torch.randn(3, 5), torch.tensor([0, 4, IGNORED]), torch.empty(3)
    kept = logits.clone()
    rows = torch.ops.sorted_kernels.cross_entropy_rows_
    for message, arguments in {
        "target has 5": (logits, target.clamp(min=5), None, IGNORED, 0.0, True, losses),
        "target has -1": (logits, target.clamp(min=-1), None, IGNORED, 0.0, True, losses),
        "2 axes": (logits[0], target, None, IGNORED, 0.0, True, losses),
        "inner stride": (logits.t(), torch.zeros(5).long(), None, 0, 0.0, True, torch.empty(5)),
        "target must": (logits, target.int(), None, IGNORED, 0.0, True, losses),
        "losses must": (logits, target, None, IGNORED, 0.0, True, losses[:2]),
        "scale must": (logits, target, losses.double(), IGNORED, 0.0, True, losses),
        "have loops": (logits.double(), target, None, IGNORED, 0.0, True, losses),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            rows(*arguments)
    assert_same_bits(logits, kept)
    add = torch.ops.sorted_kernels.add_transposed_
    for message, arguments in {
        "m, n": (logits, logits, True),
        "total must be float32": (logits.double(), torch.ones(5, 3), True),
        "inner stride": (logits, logits.t(), True),
        "have loops": (logits, torch.ones(5, 3, dtype=torch.float64), True),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            add(*arguments)
    assert_same_bits(logits, kept)
