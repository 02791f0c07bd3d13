"""Compile every Triton kernel for a real GPU architecture, on a machine that has no GPU.

``compile_kernels`` starts this file in a process where the interpreter is off. There the public
functions are called on small CPU tensors, while the launch of a kernel only compiles it: what is
compiled has exactly the argument types, flags and tilings that a launch on a GPU would have.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
DTYPES = ("float32", "bfloat16", "float16")
FUNCTIONS = (
    "forward", "dgrad", "wgrad", "ragged forward", "ragged dgrad", "ragged wgrad",
)  # fmt: skip
INTO_FLOAT32 = ("wgrad into float32", "ragged wgrad into float32")


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of one kernel.

    Attributes:
        name: The kernel's function.
        case: What was compiled: sizes, tiling, dtype.
        dtype: Of the tensors.
        registers: A thread's.
        spills: Bytes of a thread's stack; a kernel without spills has none.
        shared_memory: Bytes of a block.
        num_warps: Warps of a block.
        instructions: Those of interest that the PTX has: mma.sync, wgmma, cp.async.16 and so on.
    """

    name: str
    case: str
    dtype: str
    registers: int
    spills: int
    shared_memory: int
    num_warps: int
    instructions: list[str]


_PATTERNS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "cp.async.16": r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10",
    "ld.global.v4": r"ld\.global\S*\.v4",
    "atom": r"\b(?:atom|red)\.global",
}


def compile_kernels(capability: int, dtypes: tuple[str, ...] = DTYPES) -> list[CompiledKernel]:
    """Compile all cases for sm_``capability`` in a process of its own."""
    rows = json.loads(_run_alone("kernels", str(capability), *dtypes))
    return [CompiledKernel(**row) for row in rows]


def count_variants(sizes: list[tuple[int, int, int]]) -> dict[str, int]:
    """How often each kernel is compiled when linear and convolution run with these (N, m, k)."""
    return json.loads(_run_alone("variants", json.dumps(sizes)))


def _run_alone(*arguments: str) -> str:
    """Run this file where the interpreter is off; what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _gemm_cases(dtype, capability: int) -> list[tuple[str, Callable[[], object]]]:
    """Every tiling that the architecture gets, for aligned and for odd sizes.

    Of float16 only one, here and below: its code differs from bfloat16's in a few conversions.
    """
    import torch

    from sorted_kernels.triton import gemm_config, launch, linear

    memory = SHARED_MEMORY[capability]
    limits = launch.DeviceLimits(1, memory, large_tiles=capability == 90)
    configs = gemm_config.FLOAT_CONFIGS if dtype == torch.float32 else gemm_config.HALF_CONFIGS
    configs = (*configs, gemm_config.decode_config(dtype))
    weight, bias = torch.zeros(256, 256, dtype=dtype), torch.zeros(256, dtype=dtype)
    wide = torch.zeros(256, 256)

    def runs(m, k):
        return [(40, m, k), (24, 48, 32)]

    def run(function, config, m, k):
        x, dy = torch.zeros(64, 256, dtype=dtype)[:, :k], torch.zeros(64, 256, dtype=dtype)[:, :m]
        if function == "forward":
            linear.linear(x, weight, bias, m, "gelu", True, config=config)
        elif function == "dgrad":
            linear.linear_dgrad(dy, weight, k, config=config)
        elif function in ("wgrad", "wgrad into float32"):
            out = weight if function == "wgrad" else wide
            linear.linear_wgrad_into(dy, x, out[:m, :k], True, config=config)
        elif function == "ragged forward":
            linear.ragged_linear(x, weight, bias, runs(m, k), "gelu", True, config=config)
        elif function == "ragged dgrad":
            linear.ragged_dgrad(dy, weight, runs(m, k), config=config)
        else:
            out = weight if function == "ragged wgrad" else wide
            linear.ragged_wgrad_into(dy, x, runs(m, k), out, True, config=config)

    cases = []
    for config in configs if dtype != torch.float16 else configs[1:2]:
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
        for m, k in [(128, 64), (127, 65)]:
            if not gemm_config.config_supports(config, dtype, limits, m % 16 == k % 16 == 0):
                continue
            if dtype == torch.float32 and config is configs[1] and m == 128:
                fast = dataclasses.replace(config, input_precision="tf32")
                cases.append((f"forward {tile} tf32", lambda c=fast: run("forward", c, 128, 64)))
            autocast = dtype == torch.bfloat16 and config in configs[:2]  # the most registers
            for function in (*FUNCTIONS, *(INTO_FLOAT32 if autocast else ())):
                label = f"{function} {tile} {'odd' if m % 2 else 'aligned'}"
                cases.append((label, lambda f=function, c=config, m=m, k=k: run(f, c, m, k)))
    return cases


def _conv_cases(dtype, capability: int) -> list[tuple[str, Callable[[], object]]]:
    """Convolution in channels_last with aligned and odd channels; depthwise; sums."""
    import torch

    from sorted_kernels.reference.conv2d import Geometry
    from sorted_kernels.triton import conv2d, conv_config, conv_wgrad, gemm_config, launch

    limits = launch.DeviceLimits(1, SHARED_MEMORY[capability], large_tiles=capability == 90)
    cases: list[tuple[str, Callable[[], object]]] = []

    def add(label, function, *args, **options):
        cases.append((label, lambda: function(*args, **options)))

    def operands(channels, layout, weight_layout):
        x = torch.zeros(2, channels, 8, 8, dtype=dtype).to(memory_format=layout)
        w = torch.zeros(channels, channels, 3, 3, dtype=dtype).to(memory_format=weight_layout)
        return x, torch.zeros_like(x[..., ::2, ::2]), w

    def product(label, operands, aligned, functions=("forward", "dgrad", "wgrad")):
        x, dy, w = operands
        bias, g = torch.zeros(w.shape[0], dtype=dtype), Geometry((2, 2), (1, 1), (1, 1), 1)
        configs = conv_config.all_conv_configs(dtype, aligned)
        for config in configs if dtype != torch.float16 else configs[-1:]:
            if not gemm_config.config_supports(config, dtype, limits, aligned):
                continue
            tile = f"conv {label} {config.block_m}x{config.block_n}x{config.block_k}"
            options = {"config": config}
            if "forward" in functions:
                add(f"{tile} forward", conv2d.conv2d, x, w, bias, g, "gelu", True, **options)
            if "wgrad" in functions:
                add(f"{tile} wgrad", conv2d.conv2d_wgrad_into, dy, x, w, g, True, **options)
            if "dgrad" in functions and config in (configs[0], configs[-1]):
                add(f"{tile} dgrad", conv2d.conv2d_dgrad, dy, w, (8, 8), g, **options)

    def depthwise(label, operands):
        x, dy, w = operands
        w, bias = w[:, :1], torch.zeros(w.shape[0], dtype=dtype)
        g = Geometry((2, 2), (1, 1), (1, 1), w.shape[0])
        add(f"depthwise {label} forward", conv2d.conv2d, x, w, bias, g, "gelu", True)
        add(f"depthwise {label} dgrad", conv2d.conv2d_dgrad, dy, w, (8, 8), g)
        add(f"depthwise {label} wgrad", conv2d.conv2d_wgrad_into, dy, x, w, g, True)

    plain, last = torch.contiguous_format, torch.channels_last
    dense = operands(64, last, last)
    product("aligned", dense, True)
    depthwise("aligned", dense)
    bias = torch.zeros(64, dtype=dtype)
    add("channel sum", conv2d.bias_grad_into, dense[1].contiguous(), bias, True)
    add("part sum", conv_wgrad.part_sum_into, torch.zeros(2, *dense[2].shape), dense[2], True)
    if dtype != torch.float16:
        product("strided weight", operands(64, last, plain), True, ("forward",))
        product("odd", operands(63, last, plain), False)
        depthwise("odd", operands(63, plain, plain))
    return cases


def _row_cases(dtype) -> list[tuple[str, Callable[[], object]]]:
    """Norms at the widths where the tiling changes, column sums, embedding."""
    import torch

    from sorted_kernels.triton import (
        batch_norm,
        embedding,
        group_norm,
        layer_norm,
        linear,
        linear_cross_entropy,
        rms_norm,
    )
    from sorted_kernels.triton import decode as decoding

    weight = torch.zeros(16384, dtype=dtype)

    def layer(k):
        x, rows = torch.zeros(4, k, dtype=dtype), torch.zeros(4, 1)
        layer_norm.layer_norm(x, weight, weight, 1e-5)
        layer_norm.layer_norm_backward_into(
            x, x, rows, rows, weight, weight[:k], weight[:k], True, True
        )
        runs = [(1, 1, k), (3, 1, k - 32)]
        layer_norm.ragged_layer_norm(x, weight, weight, runs, 1e-5)
        layer_norm.ragged_layer_norm_backward_into(
            x, x, rows, rows, weight, runs, weight, weight, True, True
        )

    def rms(k):
        x, rows = torch.zeros(4, k, dtype=dtype), torch.zeros(4, 1)
        rms_norm.rms_norm(x, weight, 1e-5)
        rms_norm.rms_norm_backward_into(x, x, rows, weight, weight[:k], True)
        runs = [(1, 1, k), (3, 1, k - 32)]
        rms_norm.ragged_rms_norm(x, weight, runs, 1e-5)
        rms_norm.ragged_rms_norm_backward_into(x, x, rows, weight, runs, weight, True)

    def outer(k):
        channels(torch.zeros(2, 5, k, dtype=dtype))

    def inner(k):
        channels(torch.zeros(2, 4, 4, k, dtype=dtype).permute(0, 3, 1, 2))

    def channels(x):
        c = x.shape[1]
        one, many, part = torch.zeros(c), torch.zeros(2 * c), weight[:c]
        batch_norm.batch_norm(x, weight, weight, weight, weight, True, 0.1, 1e-5)
        group_norm.group_norm(x, weight, weight, c, 1e-5)
        outs = part, part, True, True
        for training in (True, False):
            batch_norm.batch_norm_backward_into(x, x, one, one, weight, training, *outs)
        group_norm.group_norm_backward_into(x, x, many, many, weight, c, *outs)

    def sums(k):
        linear.bias_grad_into(torch.zeros(4, k, dtype=dtype), weight[:k], True)
        linear.ragged_bias_grad_into(torch.zeros(4, k, dtype=dtype), [(4, k, 1)], weight, True)

    def decode(k):
        x, y = torch.zeros(4, k, dtype=dtype), torch.zeros(4, 1024, dtype=dtype)
        table, rows = weight.view(-1, 1024)[:, :k], torch.ones(4, dtype=torch.int32)
        out = y.view(-1)[: 4 * k].view(4, k)
        decoding.split_product(x, table, out, 2, bias=weight, z=y, activation="gelu")
        decoding.split_product(x, table, out, 2, transposed=False)
        each = {"limits": rows, "widths": rows, "aligned": k % 16 == 0}
        decoding.split_product(x, table, out, 2, bias=weight, z=y, activation="gelu", **each)
        decoding.split_product(x, table, out, 2, transposed=False, **each)

    def lookup(k):
        indices, table = torch.zeros(4, dtype=torch.int64), weight.view(16, 1024)
        embedding.embedding(indices, table, k)
        embedding.embedding_backward_into(
            torch.zeros(4, k, dtype=dtype), indices, table[:, :k], True
        )
        runs = [(1, 1, k), (3, 1, k - 32)]
        embedding.ragged_embedding(indices, table, runs)
        embedding.ragged_embedding_backward_into(
            torch.zeros(4, k, dtype=dtype), indices, runs, table, True
        )

    def cross_entropy(k):
        logits = torch.zeros(2, k + 64, dtype=dtype)[:, :k]
        target, scale = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
        for smoothing, scaled, gradient in (
            (0.0, None, True),
            (0.1, scale, True),
            (0.1, None, False),
        ):
            linear_cross_entropy.cross_entropy_(logits, target, scaled, -100, smoothing, gradient)

    cases = []
    for function, widths in (
        (layer, (63, 768, 4095, 8191, 8192, 16384)),
        (rms, (64, 8192, 16384)),
        (outer, (63, 1024)),
        (inner, (63, 256)),
        (sums, (63, 64)),
        (lookup, (63, 768)),
        (decode, (1023, 1024)),
        (cross_entropy, (65, 49152)),
    ):
        for k in widths if dtype != torch.float16 else widths[-1:]:
            cases.append((f"{function.__name__} {k}", lambda f=function, k=k: f(k)))
    return cases


def _attention_cases(dtype, capability: int) -> list[tuple[str, Callable[[], object]]]:
    """Each tiling, with and without a mask of its own rows, heads that fill no power of two."""
    import torch

    from sorted_kernels.triton import attention, attention_config, launch

    limits = launch.DeviceLimits(1, SHARED_MEMORY[capability], large_tiles=capability == 90)

    def run(head_dim, mask, counts, causal):
        has_rows = mask is not None and mask.shape[2] > 1
        configs = attention_config.choose_configs(head_dim, dtype, has_rows, limits)
        q = torch.zeros(2, 64, 4, head_dim, dtype=dtype).transpose(1, 2)
        k = torch.zeros(2, 64, 2, head_dim, dtype=dtype).transpose(1, 2)
        out, lse = attention.attention(q, k, k, mask, counts, causal, 0.1, configs=configs)
        attention.attention_backward(
            q, q, k, k, mask, counts, out, lse, causal, 0.1, configs=configs
        )

    counts = torch.tensor([2, 4])
    rows, padding = torch.zeros(1, 4, 64, 64, dtype=dtype), torch.zeros(2, 1, 1, 64).bool()
    problems = [
        (64, rows, counts, True), (80, rows, None, False), (64, None, None, False),
        (128, padding, None, True),
    ]  # fmt: skip
    problems = problems[: {torch.float32: 2, torch.float16: 1}.get(dtype)]
    return [(f"attention {p[0]} {i}", lambda p=p: run(*p)) for i, p in enumerate(problems)]


class _TargetDriver:
    """Stands in for the CUDA driver where there is none: says which GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as cuobjdump reads them from the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump names no registers: {text!r}")
    return int(usage[1]), int(usage[2])


def _compile_instead_of_launching(capability: int, seen: Callable[..., None]) -> None:
    """Make launches compile, and hand the kernel's name and what became of it to ``seen``."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_TargetDriver(capability))
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        seen(self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only


def _kernels(capability: int, dtypes: list[str]) -> list[dict]:
    import torch

    rows: dict[str, CompiledKernel] = {}
    label, dtype_name = "", ""

    def seen(name, kernel):
        if kernel.hash in rows:
            return
        registers, stack = _resources(kernel.asm["cubin"])
        found = [key for key, text in _PATTERNS.items() if re.search(text, kernel.asm["ptx"])]
        rows[kernel.hash] = CompiledKernel(
            name, label, dtype_name, registers, stack,
            kernel.metadata.shared, kernel.metadata.num_warps, found,
        )  # fmt: skip

    _compile_instead_of_launching(capability, seen)
    for dtype_name in dtypes:
        dtype = getattr(torch, dtype_name)
        cases = (
            _gemm_cases(dtype, capability)
            + _conv_cases(dtype, capability)
            + _row_cases(dtype)
            + _attention_cases(dtype, capability)
        )
        for label, call in cases:  # noqa: B007
            call()
    return [asdict(row) for row in rows.values()]


def _variants(sizes: list[tuple[int, int, int]]) -> dict[str, int]:
    import torch

    from sorted_kernels.reference.conv2d import Geometry
    from sorted_kernels.triton import attention, conv2d, conv_config, gemm_config, linear

    hashes: dict[str, set[str]] = {}
    use = ""  # of a kernel that serves two

    def seen(name, kernel):
        hashes.setdefault(f"{name}{use}", set()).add(kernel.hash)

    _compile_instead_of_launching(90, seen)
    weight, x, dy = torch.zeros(3, 256, 256, dtype=torch.bfloat16)
    filters = torch.zeros(512, 512, 3, 3, dtype=torch.bfloat16)
    for n, m, k in sizes:
        config = gemm_config.HALF_CONFIGS[2]
        linear.linear(x[:n, :k], weight, None, m, "none", False, config=config)
        linear.linear_dgrad(dy[:n, :m], weight, k, config=config)
        linear.linear_wgrad_into(dy[:n, :m], x[:n, :k], weight[:m, :k], True, config=config)
        runs = [(n, m, k), (2, 16, 16)] if m % 16 == 0 else [(n, m, k), (1, 2, 2), (3, 1, 1)]
        linear.ragged_linear(x, weight, None, runs, "none", False, config=config)
        linear.ragged_dgrad(dy, weight, runs, config=config)
        linear.ragged_wgrad_into(dy, x, runs, weight, True, config=config)
        linear.ragged_bias_grad_into(dy, runs, weight[0], True)
        config = conv_config.HALF_ODD_CONFIGS[0]
        wide = k + 48  # beyond the channels of depthwise's narrow tiles
        for groups, out, channels in ((1, m, k), (wide, wide, wide)):
            g, w = Geometry((1, 2), (1, 1), (1, 1), groups), filters[:out, : channels // groups]
            images = torch.zeros(n, channels, 3, 4 + n, dtype=torch.bfloat16)
            images = images.to(memory_format=torch.channels_last)
            use = ", forward"
            y, _ = conv2d.conv2d(images, w, None, g, "none", False, config=config)
            use = ", dgrad"
            conv2d.conv2d_dgrad(y, w, images.shape[2:], g, config=config)
            use = ""
            conv2d.conv2d_wgrad_into(y, images, w, g, True, config=config)
        conv2d.bias_grad_into(y.contiguous(), filters[0, :wide, 0, 0], True)
        q = torch.zeros(n, m, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
        keys = torch.zeros(n, k, 2, 64, dtype=torch.bfloat16).transpose(1, 2)
        mask, counts = torch.zeros(n, 1, m, k, dtype=torch.bool), torch.ones(n, dtype=torch.int64)
        out, lse = attention.attention(q, keys, keys, mask, counts, True, 0.1)
        attention.attention_backward(q, q, keys, keys, mask, counts, out, lse, True, 0.1)
    return {name: len(variants) for name, variants in hashes.items()}


if __name__ == "__main__":
    if sys.argv[1] == "kernels":
        print(json.dumps(_kernels(int(sys.argv[2]), sys.argv[3:])))
    else:
        print(json.dumps(_variants(json.loads(sys.argv[2]))))
