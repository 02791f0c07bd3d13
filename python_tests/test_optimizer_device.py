"""The staircase optimizers' ops on the machine's best device, against float64 on the CPU."""

import random

import pytest
import torch

from sorted_kernels.ops.optimizer import adamw_fallback, sgd_fallback
from sorted_kernels.staircase import Staircase

SHAPES = [(1, 1), (7, 5), (33, 129), (64, 64), (3, 2050), (257,), (1,)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


def problem(dtype, grad_dtype, states, seed):
    """Parameters cut out of wider buffers, gradients, states, masters, and random staircases."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def draw(shape, kind, scale=1.0):
        padded = (*shape[:-1], shape[-1] + 3)
        return (scale * torch.randn(padded, generator=generator)).to(kind)[..., : shape[-1]]

    masters = [draw(shape, wide) for shape in SHAPES] if wide != dtype else []
    params = [m.to(dtype) for m in masters] or [draw(shape, dtype) for shape in SHAPES]
    grads = [draw(shape, grad_dtype) for shape in SHAPES]
    held = [[draw(shape, wide, 0.1).abs() for shape in SHAPES] for _ in range(states)]
    bands = []
    for index, shape in enumerate(SHAPES):
        staircase = Staircase(shape[0], shape[1] if len(shape) > 1 else 1)
        for _ in range(rng.randint(1, 3)):
            staircase.add(rng.randint(1, staircase.rows), rng.randint(1, staircase.cols))
        for band in staircase.bands():
            bands += (index, *band)
    return params, grads, held, masters, bands


def run(op, oracle, problem, device, arguments):
    """Run the op on the device and the fallback in float64; return both sets of tensors."""
    params, grads, held, masters, bands = problem

    def moved(lists, to):
        return [[to(tensor) for tensor in tensors] for tensors in lists]

    ours = moved((params, grads, *held, masters), lambda t: t.to(device, copy=True))
    exact = moved((masters or params, grads, *held, []), lambda t: t.to(torch.float64, copy=True))
    op(*ours, bands, *arguments)
    oracle(*exact, bands, *arguments)
    return ours, exact


def check(ours, exact, problem, dtype):
    """Covered elements agree with float64; the others keep their bits."""
    bands, start = problem[4], (problem[0], problem[1], *problem[2], problem[3])
    for mine, theirs, before in zip(ours, exact, start, strict=True):
        for index, tensor in enumerate(mine):
            covered = torch.zeros(tensor.shape, dtype=torch.bool)
            for i in range(0, len(bands), 4):
                if bands[i] == index:
                    _, begin, end, cols = bands[i : i + 4]
                    block = covered[begin:end]
                    (block if block.dim() == 1 else block[:, :cols]).fill_(True)
            tensor = tensor.cpu()
            assert torch.equal(tensor[~covered], before[index][~covered])
            if theirs:
                tolerance = 2 * torch.finfo(tensor.dtype).eps
                torch.testing.assert_close(
                    tensor[covered].double(), theirs[index][covered], rtol=8 * tolerance, atol=1e-6
                )
    if ours[-1]:
        for param, master in zip(ours[0], ours[-1], strict=True):
            assert torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("clear_grads", [False, True], ids=["keep", "clear"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
def test_adamw_on_device(device, dtype, grad_dtype, clear_grads):
    for seed in range(5):
        case = problem(dtype, grad_dtype, 2, seed)
        steps = [1 + 3 * index for index in range(len(SHAPES))]
        arguments = (steps, 1e-2, 0.9, 0.99, 1e-3, 0.1, seed % 2 == 1, clear_grads)
        op = torch.ops.sorted_kernels.staircase_adamw_
        ours, exact = run(op, adamw_fallback, case, device, arguments)
        check(ours, exact, case, dtype)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
def test_sgd_on_device(device, dtype, grad_dtype, momentum):
    for seed in range(5):
        case = problem(dtype, grad_dtype, 1, seed)
        if not momentum:
            case = (*case[:2], [[]], *case[3:])
        arguments = (1e-2, momentum, 0.1, momentum > 0 and seed % 2 == 0, False, True)
        op = torch.ops.sorted_kernels.staircase_sgd_
        ours, exact = run(op, sgd_fallback, case, device, arguments)
        check(ours, exact, case, dtype)
