"""Run each of the library's GPU kernels at small odd sizes: the program to put under a sanitizer.

Memory comes from single allocations, not from torch's pool, so that a sanitizer sees an access
beyond a tensor's end. Results are compared with the CPU's float64 ones, because a sanitizer says
nothing of wrong numbers.

``python -m bench.exercise_kernels [--device cuda]``
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import sorted_kernels as sk
from bench.environment import runs_compiled_gemm
from bench.harness import relative_difference
from sorted_kernels import env
from sorted_kernels.cuda import linear as cuda_linear
from sorted_kernels.ops import backend, optimizer
from sorted_kernels.reference import conv2d as conv_reference

ROWS, FEATURES, ACTIVE, TABLE = 37, 75, 53, 29
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # float32: tf32 products are allowed

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: sk.nn.Linear(FEATURES, FEATURES + 6, in_dim="features", out_dim="out"),
    "linear, gelu": lambda: sk.nn.Linear(
        FEATURES, FEATURES, in_dim="features", out_dim="features", activation="gelu"
    ),
    "layer_norm": lambda: sk.nn.LayerNorm(FEATURES, dim="features"),
    "rms_norm": lambda: sk.nn.RMSNorm(FEATURES, eps=1e-6, dim="features"),
    "batch_norm": lambda: sk.nn.BatchNorm1d(FEATURES, dim="features"),
    "group_norm": lambda: sk.nn.GroupNorm(FEATURES, FEATURES, dim="features"),
    "conv2d": lambda: sk.nn.Conv2d(
        FEATURES, FEATURES + 6, 3, 2, 1, in_dim="features", out_dim="out", activation="silu"
    ),
    "conv2d, 1x1": lambda: sk.nn.Conv2d(FEATURES, FEATURES, 1, in_dim="features"),
    "conv2d, depthwise": lambda: sk.nn.Conv2d(
        FEATURES, FEATURES, 3, padding=1, groups=FEATURES, in_dim="features"
    ),
    "embedding": lambda: sk.nn.Embedding(TABLE, FEATURES, dim="features"),
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: sk.optim.AdamW(parameters, lr=1e-2, eps=1e-3),
    "sgd": lambda parameters: sk.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


def _input(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "embedding":
        return torch.randint(TABLE, (ROWS,), generator=generator)
    if name.startswith("conv2d"):
        return torch.randn(3, ACTIVE, 9, 7, generator=generator).to(dtype)
    space = (6,) if name == "group_norm" else ()  # one channel a group: more than one value each
    return torch.randn(ROWS, ACTIVE, *space, generator=generator).to(dtype)


def train(layer: nn.Module, x: Tensor, optimizer: str, *widths: sk.RowWidths) -> list[Tensor]:
    """Two forward and backward passes and optimizer steps; output, gradients and weights."""
    leaf = x.clone().requires_grad_(x.is_floating_point())
    parameters = list(layer.parameters())
    stepper = OPTIMIZERS[optimizer](parameters)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        stepper.zero_grad()
        y = layer(leaf, *widths)
        y.backward(torch.randn(y.shape, generator=generator).to(y))
        gradients = [parameter.grad.clone() for parameter in parameters]
        stepper.step()
    return [y, *([leaf.grad] if leaf.requires_grad else []), *gradients, *parameters]


def exercise(name: str, dtype: torch.dtype, optimizer: str, device: torch.device) -> float:
    """Largest difference of one layer's training on the device from that in float64 on the CPU."""
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    exact = copy.deepcopy(layer).double()
    layer.to(device)
    for module in (layer, exact):
        sk.activate(module, sk.Submodel(**dict.fromkeys(sk.nn.dimensions(module), ACTIVE)))
    x = _input(name, dtype)
    wide = x if name == "embedding" else x.double()
    pairs = zip(train(layer, x.to(device), optimizer), train(exact, wide, optimizer), strict=True)
    return max(relative_difference(ours.cpu(), right) for ours, right in pairs)


def _verdict(measure: Callable[[], float], tolerance: float) -> str:
    """How one exercise ended, ``right`` first if all was well; an error leaves the others alone."""
    try:
        difference = measure()
    except Exception as error:  # a compiler's errors have no common class
        return f"FAILED: {type(error).__name__}: {error}"
    return f"{'right' if difference <= tolerance else 'WRONG'} (off by {difference:.1e})"


RAGGED = ((20, 75, 70), (10, 53, 70), (6, 53, 9), (1, 1, 1))


def exercise_gemm(mode: str, runs: tuple[tuple[int, int, int], ...], device: torch.device) -> float:
    """Largest difference of the compiled GEMM's result from the sum of its runs' in float64."""
    generator = torch.Generator().manual_seed(3)
    rows, (_, m, k) = sum(run[0] for run in runs), runs[0]
    shapes = {"x": (rows, k), "weight": (m, k), "dy": (rows, m)}
    values = {
        name: torch.randn(count, -(-width // 8) * 8, generator=generator).bfloat16()[:, :width]
        for name, (count, width) in shapes.items()
    }
    here = {name: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device).copy_(v)
            for name, v in values.items()}  # fmt: skip
    x, weight, dy = (values[name].double() for name in shapes)
    right = torch.zeros({"forward": (rows, m), "dgrad": (rows, k), "wgrad": (m, k)}[mode]).double()
    begin = 0
    for count, out, into in runs:
        part = slice(begin, begin + count)
        begin += count
        if mode == "forward":
            right[part, :out] = x[part, :into] @ weight[:out, :into].T
        elif mode == "dgrad":
            right[part, :into] = dy[part, :out] @ weight[:out, :into]
        else:
            right[:out, :into] += dy[part, :out].T @ x[part, :into]
    if mode == "forward":
        ours, _ = cuda_linear.ragged_linear(here["x"], here["weight"], None, runs, "none", False)
    elif mode == "dgrad":
        ours = cuda_linear.ragged_dgrad(here["dy"], here["weight"], runs)
    else:
        ours = torch.zeros(m, k, device=device)
        cuda_linear.ragged_wgrad_into(here["dy"], here["x"], runs, ours, True)
    return relative_difference(ours.cpu(), right)


ROW_STEP = 8  # of a parent that TMA addresses: its rows are multiples of 16 bytes
BATCHES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "uniform": ((ROWS, 75, 70),),
    "few rows": ((9, 75, 1030),),
    "ragged": RAGGED,
    "ragged, few rows": ((4, 75, 1030), (3, 53, 700), (1, 1, 1)),
}
"""Runs of (rows, m, k). Of a few rows with long sums, reductions are cut."""


@contextlib.contextmanager
def forced(setting: str) -> Iterator[None]:
    """Within the block every op asks for one back end."""
    before = os.environ.get("SORTED_KERNELS_BACKEND")
    os.environ["SORTED_KERNELS_BACKEND"] = setting
    backend.reset()
    try:
        yield
    finally:
        os.environ["SORTED_KERNELS_BACKEND"] = before or ""
        backend.reset()


def back_ends(device: torch.device) -> list[str]:
    """The back ends of linear products that can run on a device."""
    interpreted = device.type == "cpu" and env.triton_interpreter()
    able = {
        "cuda": device.type == "cuda" and runs_compiled_gemm(),
        "triton": backend.has_triton() and (interpreted or device.type == "cuda"),
        "reference": device.type == "cpu",
    }
    return [name for name, can in able.items() if can]


def reached(x: Tensor, weight: Tensor, sizes: tuple[int, int], ragged: bool) -> set[str]:
    """The back ends of the three products of a linear layer."""
    (m, k), dy = sizes, x.new_empty(len(x), sizes[0])
    operands = {"forward": (x, weight), "dgrad": (dy, weight), "wgrad": (dy, x, weight)}
    modules = (
        backend.linear_implementation(product, tensors, m, k, ragged=ragged)
        for product, tensors in operands.items()
    )
    return {module.__name__.split(".")[1] for module in modules}


def exercise_linear(setting: str, batch: str, autocast: bool, device: torch.device) -> float:
    """Largest difference of a linear layer's training from that in float64, by the public ops.

    All three products have to reach the back end that was asked for.

    Args:
        setting: Back end to force.
        batch: One of :data:`BATCHES`.
        autocast: Whether parameters and their gradients are float32.
        device: Where.
    """
    torch.manual_seed(0)
    runs, half = BATCHES[batch], torch.bfloat16
    (_, m, k), ragged = runs[0], len(runs) > 1
    into, out = (-(-size // ROW_STEP) * ROW_STEP + ROW_STEP for size in (k, m))
    layer = sk.nn.Linear(into, out, in_dim="into", out_dim="out", activation="silu")
    layer.to(torch.float32 if autocast else half)
    exact = copy.deepcopy(layer).double()
    layer.to(device)
    for module in (layer, exact):
        sk.activate(module, sk.Submodel(into=k, out=m))
    widths = (sk.RowWidths(runs),) if ragged else ()
    x = torch.randn(sum(run[0] for run in runs), k).to(half)
    with forced(setting):
        found = reached(x.to(device), layer.weight.detach().to(half), (m, k), ragged)
        if found != {setting}:
            raise RuntimeError(f"products ran in {', '.join(sorted(found))}")
        with torch.autocast(device.type, half, enabled=autocast):
            ours = train(layer, x.to(device), "sgd", *widths)
    pairs = zip(ours, train(exact, x.double(), "sgd", *widths), strict=True)
    return max(relative_difference(each.cpu(), right) for each, right in pairs)


CONVOLUTIONS: dict[str, tuple[int, int, int, conv_reference.Geometry]] = {
    "odd": (21, 37, 3, conv_reference.Geometry((2, 2), (1, 1), (1, 1), 1)),
    "aligned": (48, 32, 3, conv_reference.Geometry((1, 2), (2, 1), (2, 1), 1)),
    "grouped": (32, 64, 3, conv_reference.Geometry((1, 1), (1, 1), (1, 1), 2)),
    "depthwise": (37, 37, 5, conv_reference.Geometry((2, 1), (2, 2), (1, 1), 37)),
    "depthwise, aligned": (80, 80, 3, conv_reference.Geometry((1, 1), (1, 1), (1, 1), 80)),
}
"""Input and output channels, taps and geometry."""


def exercise_conv(name: str, last: bool, dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference of Triton's convolution and gradients from those in float64.

    The weight is a part of a larger one. There are pixels enough for gradients in parts.
    """
    from sorted_kernels.triton import conv2d as conv

    channels, out_channels, taps, geometry = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
        return torch.randn(shape, generator=generator).to(dtype).to(memory_format=layout)

    def block(parent: Tensor) -> Tensor:
        return parent[:out_channels, : channels // geometry.groups, 1:-1, 1:-1]

    x, bias, size = random(3, channels, 39, 45), random(out_channels), (39, 45)
    stored = random(out_channels + 2, channels // geometry.groups + 3, taps + 2, taps + 2) / taps
    w, wide = block(stored.to(device)), (x.double(), block(stored).double(), bias.double())
    right, _ = conv_reference.conv2d(*wide, geometry, "silu", False)
    dy = random(*right.shape)
    grads = torch.zeros_like(stored, device=device), torch.zeros_like(bias, device=device)
    there = x.to(device), dy.to(device)
    y, _ = conv.conv2d(there[0], w, bias.to(device), geometry, "silu", True)
    dx = conv.conv2d_dgrad(there[1], w, size, geometry)
    conv.conv2d_wgrad_into(there[1], there[0], block(grads[0]), geometry, True)
    conv.bias_grad_into(there[1], grads[1], True)
    exact = conv_reference.conv2d_backward(dy.double(), *wide[:2], geometry, True, True, True)
    ours = (y, dx, block(grads[0]), grads[1])
    pairs = zip(ours, (right, *exact), strict=True)
    return max(relative_difference(result.cpu(), wanted) for result, wanted in pairs)


def exercise_attention(dtype: torch.dtype, masked: bool, device: torch.device) -> float:
    """Largest difference of attention and its gradients from those in float64 on the CPU.

    Each sample has its own number of heads, so that the device's kernel runs, if it may.
    """
    generator = torch.Generator().manual_seed(4)
    sizes = ((3, ROWS, 6, ACTIVE), (3, ACTIVE, 3, ACTIVE), (3, ACTIVE, 3, ACTIVE))
    values = [torch.randn(size, generator=generator).to(dtype).transpose(1, 2) for size in sizes]
    upstream = torch.randn(values[0].shape, generator=generator).to(dtype)
    mask = torch.rand(3, 1, 1, ACTIVE, generator=generator) < 0.5 if masked else None
    results = []
    for where, kind in ((device, dtype), (torch.device("cpu"), torch.float64)):
        leaves = [value.to(where, kind, copy=True).requires_grad_() for value in values]
        counts = torch.tensor([6, 2, 4], device=where)
        given = None if mask is None else mask.to(where)
        y = sk.attention(*leaves, num_heads=counts, mask=given, causal=masked)
        y.backward(upstream.to(where, kind))
        results.append([y, *(leaf.grad for leaf in leaves)])
    pairs = zip(*results, strict=True)
    return max(relative_difference(ours.cpu(), right) for ours, right in pairs)


def exercise_head(exits: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference of a head's cross-entropy and gradients from those in float64.

    Exits count differently, so that the backward computes them anew.
    """
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(exits, ROWS, ACTIVE, generator=generator).to(dtype)
    head = sk.nn.Linear(FEATURES, TABLE, dtype=dtype, in_dim="features")
    exact = copy.deepcopy(head).double()
    head.to(device)
    target = torch.randint(TABLE, (ROWS,), generator=generator)
    target[::5] = -100
    results = []
    for layer, x in ((head, hidden.to(device)), (exact, hidden.double())):
        sk.activate(layer, sk.Submodel(features=ACTIVE))
        leaf = x.requires_grad_()
        losses = sk.nn.LinearCrossEntropy(layer, label_smoothing=0.1)(leaf, target.to(x.device))
        losses.backward(torch.arange(1, exits + 1).to(losses))
        results.append([losses, leaf.grad, *(p.grad for p in layer.parameters())])
    pairs = zip(*results, strict=True)
    return max(relative_difference(ours.cpu(), right) for ours, right in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Exercise everything; 0 if all results are right."""
    parser = argparse.ArgumentParser(prog="python -m bench.exercise_kernels", description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when torch first allocates
    for op in backend.OPS:
        print(f"{op} on {device.type}: {backend.choose(op, device.type).backend}")
    native = optimizer.use_native(device.type)
    print(f"optimizers on {device.type}: {'native' if native else 'reference'}")
    verdicts = []

    def note(label: str, measure: Callable[[], float], tolerance: float) -> None:
        verdicts.append(_verdict(measure, tolerance))
        print(f"{label}: {verdicts[-1]}", flush=True)

    for dtype, name, stepper in itertools.product(TOLERANCES, LAYERS, OPTIMIZERS):
        label = f"{name}, {stepper}, {str(dtype).removeprefix('torch.')}"
        note(label, partial(exercise, name, dtype, stepper, device), TOLERANCES[dtype])
    for dtype, masked in itertools.product(TOLERANCES, (False, True)):
        label = f"attention, {'causal and masked, ' if masked else ''}{str(dtype).split('.')[1]}"
        note(label, partial(exercise_attention, dtype, masked, device), TOLERANCES[dtype])
    for setting, batch, autocast in itertools.product(back_ends(device), BATCHES, (False, True)):
        label = f"linear by {setting}, {batch}{', autocast' if autocast else ''}"
        measure = partial(exercise_linear, setting, batch, autocast, device)
        note(label, measure, TOLERANCES[torch.bfloat16])
    for mode in ("forward", "dgrad", "wgrad") if "cuda" in back_ends(device) else ():
        for label, runs in {"uniform": ((37, 75, 53),), "ragged": RAGGED}.items():
            note(
                f"compiled gemm, {mode}, {label}", partial(exercise_gemm, mode, runs, device), 3e-2
            )
    convolutions = itertools.product(TOLERANCES, CONVOLUTIONS, (False, True))
    for dtype, name, last in convolutions if device.type == "cuda" and backend.has_triton() else ():
        layout = "channels_last" if last else "contiguous"
        label = f"convolution, {name}, {layout}, {str(dtype).removeprefix('torch.')}"
        note(label, partial(exercise_conv, name, last, dtype, device), TOLERANCES[dtype])
    heads = itertools.product(TOLERANCES, (1, 3)) if device.type == "cuda" else ()
    for dtype, exits in heads:
        label = f"linear cross-entropy, exits {exits}, {str(dtype).removeprefix('torch.')}"
        note(label, partial(exercise_head, exits, dtype, device), TOLERANCES[dtype])
    return 0 if all(verdict.startswith("right") for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
