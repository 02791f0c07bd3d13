"""The CUDA GEMM's own device code on emulated threads, copies and tensor cores, against float64.

Copies land late and in any order, and products read shared memory when they are waited for, so a
stage that is given back too early, or a wrong phase, gives wrong numbers here or no end.
"""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support.gemm import MODES, exact, random_runs, row_sizes

host = pytest.importorskip(
    "sorted_kernels._host", reason="the planning code was not compiled (no C++ compiler)"
)

modes = pytest.mark.parametrize("mode", MODES)
PATTERN = 7.0


def array(tensor):
    """A NumPy view of a CPU tensor; half precision as its bits."""
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


def parent(rows, cols, dtype):
    """Random numbers in the leading block of a buffer that is NaN elsewhere."""
    buffer = torch.full((rows + 2, -(-cols // 8) * 8 + 8), torch.nan, dtype=dtype)
    buffer[:rows, :cols] = torch.randn(rows, cols)
    return buffer


class Problem:
    """A ragged product's operands in parents, NaN past each row's sizes."""

    def __init__(self, mode, runs, dtype=torch.bfloat16):
        self.mode, self.runs, self.dtype = mode, runs, dtype
        m, k = row_sizes(runs)
        self.sizes = len(m), int(m[0]), int(k[0])
        n, m_max, k_max = self.sizes
        self.x, self.weight, self.dy = (
            parent(*shape, dtype) for shape in ((n, k_max), (m_max, k_max), (n, m_max))
        )
        self.x[:n][torch.arange(self.x.shape[1]) >= torch.tensor(k)[:, None]] = torch.nan
        self.dy[:n][torch.arange(self.dy.shape[1]) >= torch.tensor(m)[:, None]] = torch.nan
        blocks = (self.x[:n, :k_max], self.weight[:m_max, :k_max], self.dy[:n, :m_max])
        self.blocks = dict(zip(("x", "weight", "dy"), blocks, strict=True))
        self.wanted = exact(mode, *(block.double().numpy() for block in blocks), runs)

    def operands(self):
        names = {"forward": ("x", "weight"), "dgrad": ("dy", "weight"), "wgrad": ("dy", "x")}
        return [array(self.blocks[name]) for name in names[self.mode]]

    def output(self, dtype):
        """A pattern, with zeros where a ragged product may leave them; and the writable columns."""
        rows, cols = self.wanted.shape
        if self.mode != "wgrad":
            cols = -(-cols // 64) * 64
        out = torch.full((rows + 2, cols + 8), PATTERN, dtype=dtype)
        if self.mode != "wgrad":
            out[:rows, :cols] = 0.0 if len(self.runs) > 1 else torch.nan
        return out, cols

    def run(self, choice, out_dtype=None, **options):
        out, cols = self.output(out_dtype or self.dtype)
        rows = self.wanted.shape[0]
        half = str(self.dtype).removeprefix("torch.")
        target = array(out)[:rows, :cols]
        host.run_gemm(self.mode, *self.operands(), target, self.runs, choice, half=half, **options)
        return out

    def check(self, out, wanted=None):
        wanted = self.wanted if wanted is None else wanted
        rows, cols = wanted.shape
        found = out[:rows, :cols].double().numpy()
        # Sums are float32, rounded once. The rounding is relative to each element.
        eps = torch.finfo(out.dtype).eps
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=eps, atol=1e-6 * max(1.0, largest))
        written = cols if self.mode == "wgrad" else -(-cols // 64) * 64
        assert (out[:rows, cols:written] == 0).all(), "padding is zero"
        assert (out[rows:] == PATTERN).all() and (out[:, written:] == PATTERN).all()


def tiles(rng, split=None):
    return host.TileChoice(128, rng.choice([128, 256]), 64, split or rng.choice([1, 1, 2, 3]))


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_ragged_products(mode, dtype):
    for seed in range(25 if dtype == torch.bfloat16 else 8):
        rng = random.Random(seed)
        problem = Problem(mode, random_runs(rng, 300, 330), dtype)
        problem.check(problem.run(tiles(rng), blocks=rng.randint(1, 5), seed=seed))


@modes
def test_uniform_products(mode):
    """One tile and many, one reduction step and more than there are stages."""
    sizes = [(1, 1, 1), (1, 500, 3), (129, 257, 65), (128, 256, 64), (64, 64, 1000), (300, 7, 450)]
    for seed, size in enumerate(sizes):
        rng = random.Random(seed)
        for split in (1, 3):
            problem = Problem(mode, [size])
            problem.check(problem.run(tiles(rng, split), blocks=rng.randint(1, 5), seed=seed))


@modes
def test_sizes_in_device_memory(mode):
    """Operands and output of the largest sizes, of which the kernel uses what the memory says."""
    for seed in range(12):
        rng = random.Random(seed)
        problem = Problem(mode, [(rng.randint(1, 200), rng.randint(1, 300), rng.randint(1, 300))])
        n, m, k = problem.sizes
        largest = (n, m + rng.randint(0, 4), k + rng.randint(0, 4))
        for name, (rows, cols) in {"x": (0, 2), "weight": (1, 2), "dy": (0, 1)}.items():
            whole = getattr(problem, name)  # what is beyond the sizes is NaN
            problem.blocks[name] = whole[: min(largest[rows], len(whole)), : largest[cols]]
        shape = {"forward": (n, m, k), "dgrad": (n, k, m), "wgrad": (m, k, n)}[mode]
        out, cols = problem.output(torch.bfloat16)
        choice = tiles(rng, 1)
        a, b = problem.operands()
        target = array(out)[: shape[0], :cols]
        sizes = np.array(shape, np.int32)
        host.run_gemm(mode, a, b, target, [largest], choice, sizes=sizes, blocks=3, seed=seed)
        problem.check(out)


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_bias_and_activation(activation, ragged):
    runs = [(70, 150, 100), (90, 133, 31)] if ragged else [(90, 133, 70)]
    problem = Problem("forward", runs)
    m, _ = row_sizes(runs)
    bias = torch.randn(m[0]).bfloat16()
    saved = torch.full((len(m), 192), 0.0 if ragged else torch.nan, dtype=torch.bfloat16)
    out = problem.run(
        host.TileChoice(128, 128, 64, 2), bias=array(bias), saved=array(saved),
        activation=activation,
    )  # fmt: skip
    inside = np.arange(m[0]) < m[:, None]
    z = torch.from_numpy(np.where(inside, problem.wanted + bias.double().numpy(), 0.0))
    problem.check(out, (z if activation == "none" else getattr(F, activation)(z)).numpy())
    np.testing.assert_allclose(saved[:, : m[0]].double(), z, rtol=2**-7, atol=1e-5)
    assert (saved[:, m[0] :] == 0).all()


@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weight_gradient_in_place(out_dtype, accumulate):
    """Also into a gradient whose rows are not aligned."""
    for seed in range(8):
        rng = random.Random(seed)
        problem = Problem("wgrad", random_runs(rng, 300, 200))
        rows, cols = problem.wanted.shape
        out = torch.full((rows + 2, cols + 5 + seed % 4), PATTERN, dtype=out_dtype)
        host.run_gemm(
            "wgrad", *problem.operands(), array(out)[:rows, :cols], problem.runs, tiles(rng),
            accumulate=accumulate, seed=seed,
        )  # fmt: skip
        problem.check(out, problem.wanted + PATTERN * accumulate)


@modes
def test_results_do_not_depend_on_the_order_of_things(mode):
    """Nor on the number of blocks: every element has one writer, which adds parts in order."""
    problem = Problem(mode, [(70, 150, 300), (90, 140, 260)])
    choice = host.TileChoice(128, 128, 64, 3)
    first = problem.run(choice, blocks=1)
    for seed, blocks in enumerate((2, 3, 7), 1):
        assert torch.equal(problem.run(choice, blocks=blocks, seed=seed), first)
