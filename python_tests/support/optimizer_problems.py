"""Problems for the staircase optimizers, and every implementation that solves them.

Parameters are views cut out of larger buffers. What the step must not touch holds NaN (parameters,
gradients) or a pattern (states).
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from sorted_kernels.ops import optimizer
from sorted_kernels.staircase import Staircase

try:
    from sorted_kernels import _host as host
except ImportError:
    host = None

ADAMW = torch.ops.sorted_kernels.staircase_adamw_.default
SGD = torch.ops.sorted_kernels.staircase_sgd_.default
HALF = (torch.bfloat16, torch.float16)
ADAMW_OPTIONS = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
IMPLEMENTATIONS = ["op", "fallback", "simt", "portable", "avx2"]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
DTYPE_IDS = [f"{str(p)[6:]}-{str(g)[6:]}" for p, g in DTYPES]


def padded_view(shape, dtype, fill, generator):
    """A buffer filled with ``fill``, and a view of ``shape`` in it at random offset and stride."""
    pad = torch.randint(0, 4, (3,), generator=generator).tolist()
    if len(shape) == 1:
        step = 1 if pad[2] < 3 else 2
        buffer = torch.full((pad[0] + shape[0] * step + pad[1],), fill, dtype=dtype)
        return buffer, buffer[pad[0] : pad[0] + shape[0] * step : step]
    rows, cols = shape
    buffer = torch.full((rows + 2, pad[0] + cols + pad[1]), fill, dtype=dtype)
    return buffer, buffer[1 : rows + 1, pad[0] : pad[0] + cols]


@dataclass
class Problem:
    """Tensors of one optimizer call, and a mask of the active elements of each."""

    dtype: torch.dtype
    grad_dtype: torch.dtype
    bands: list[int] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    lists: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    buffers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def compute(self):
        return torch.float32 if self.dtype in HALF else self.dtype

    def add_list(self, name, dtype, fill, value, shapes, generator):
        """One tensor a shape: ``value(mask)`` in the active elements, ``fill`` all around."""
        self.lists[name] = []
        for shape, mask in zip(shapes, self.masks, strict=True):
            buffer, view = padded_view(shape, dtype, fill, generator)
            view[mask] = value(mask).to(dtype)
            self.lists[name].append(view)
            inside = torch.zeros_like(buffer, dtype=torch.bool)
            inside.as_strided(view.shape, view.stride(), view.storage_offset())[mask] = True
            self.buffers.append((buffer, inside))

    def active(self, name):
        """The active elements of a list, as one float64 vector a tensor."""
        pairs = zip(self.lists[name], self.masks, strict=True)
        return [tensor[mask].double() for tensor, mask in pairs]


def make_problem(staircases, dtype, grad_dtype, states, seed):
    """Build a problem from staircases; those of width 1 become one-dimensional parameters."""
    generator = torch.Generator().manual_seed(seed)
    problem = Problem(dtype, grad_dtype)
    shapes = []
    for index, staircase in enumerate(staircases):
        flat = staircase.cols == 1
        shapes.append((staircase.rows,) if flat else (staircase.rows, staircase.cols))
        mask = torch.zeros(staircase.rows, staircase.cols, dtype=torch.bool)
        for begin, end, cols in staircase.bands():
            problem.bands += [index, begin, end, cols]
            mask[begin:end, :cols] = True
        problem.masks.append(mask[:, 0] if flat else mask)

    def normal(mask):
        return torch.randn(int(mask.sum()), dtype=torch.float64, generator=generator)

    def zeros(mask):
        return torch.zeros(int(mask.sum()))

    nan, pattern = float("nan"), 12345.0
    problem.add_list("params", dtype, nan, normal, shapes, generator)
    problem.add_list("grads", grad_dtype, nan, normal, shapes, generator)
    for name in states:
        problem.add_list(name, problem.compute, pattern, zeros, shapes, generator)
    problem.lists["masters"] = []
    if dtype in HALF:
        exact = iter(map(torch.Tensor.__getitem__, problem.lists["params"], problem.masks))
        problem.add_list(
            "masters", torch.float32, pattern, lambda _: next(exact), shapes, generator
        )
    return problem


def refill_grads(problem, seed):
    """Fresh random gradients in the active elements; returns them in float64."""
    generator = torch.Generator().manual_seed(seed)
    for grad, mask in zip(problem.lists["grads"], problem.masks, strict=True):
        grad[mask] = torch.randn(int(mask.sum()), generator=generator).to(grad.dtype)
    return problem.active("grads")


def as_numpy(tensors):
    """NumPy arrays that share memory; half precision as its bits."""
    return [
        t.view(torch.int16).numpy().view(np.uint16) if t.dtype in HALF else t.numpy()
        for t in tensors
    ]


def host_runner(function, engine):
    """Run one engine of the host module on a problem's tensors."""

    def run(problem, lists, **options):
        half = "float16" if problem.dtype == torch.float16 else "bfloat16"
        arrays = [as_numpy(tensors) for tensors in lists]
        getattr(host, function)(
            *arrays, problem.bands, **options, half=half, engine=engine, chunk_elements=48
        )

    return run


def runner(function, implementation):
    """The named implementation as ``run(problem, lists, **options)``."""
    if implementation == "op":  # whatever a user gets here
        op = ADAMW if function == "run_adamw" else SGD
        return lambda problem, lists, **options: op(*lists, problem.bands, **options)
    if implementation == "fallback":
        fallback = optimizer.adamw_fallback if function == "run_adamw" else optimizer.sgd_fallback
        return lambda problem, lists, **options: fallback(*lists, problem.bands, **options)
    if host is None:
        pytest.skip("sorted_kernels._host was not compiled")
    if implementation == "avx2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    return host_runner(function, implementation)


def fixed_staircases():
    """Odd, wide, tall, single-element, full, empty and one-dimensional parameters."""
    result = []
    for rows, cols, corners in [
        (13, 17, [(13, 5), (7, 9), (3, 17)]),
        (64, 64, [(64, 64)]),
        (5, 200, [(5, 33), (2, 199)]),
        (300, 2, [(299, 1)]),
        (1, 1, [(1, 1)]),
        (9, 8, []),
        (301, 1, [(150, 1)]),
        (64, 1, [(64, 1)]),
    ]:
        staircase = Staircase(rows, cols)
        staircase.update(corners)
        result.append(staircase)
    return result


@st.composite
def random_staircases(draw):
    result = []
    for _ in range(draw(st.integers(1, 4))):
        staircase = Staircase(draw(st.integers(1, 33)), draw(st.integers(1, 33)))
        for _ in range(draw(st.integers(0, 4))):
            m, k = draw(st.integers(1, staircase.rows)), draw(st.integers(1, staircase.cols))
            staircase.add(m, k)
        result.append(staircase)
    return result
