"""Compile every Triton kernel for a real GPU architecture, on a machine that has no GPU.

``compile_kernels`` starts this file in a process where the interpreter is off. There the public
functions are called on small CPU tensors, while the launch of a kernel only compiles it: what is
compiled has exactly the argument types, flags and tilings that a launch on a GPU would have.
"""

from __future__ import annotations

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
DTYPES = ("float32", "bfloat16", "float16")


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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, __file__, str(capability), *dtypes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"compilation for sm_{capability} failed:\n{done.stderr[-4000:]}")
    return [CompiledKernel(**row) for row in json.loads(done.stdout)]


def _gemm_cases(dtype) -> list[tuple[str, Callable[[], object]]]:
    """Every tiling of the tables; odd sizes for the one that most shapes get."""
    import torch

    from sorted_kernels.triton import gemm_config, linear

    configs = (
        gemm_config.FLOAT_CONFIGS if dtype == torch.float32 else gemm_config.HALF_CONFIGS
    )
    weight, bias = torch.zeros(256, 256, dtype=dtype), torch.zeros(256, dtype=dtype)

    def run(function, config, m, k):
        x, dy = torch.zeros(64, 256, dtype=dtype)[:, :k], torch.zeros(64, 256, dtype=dtype)[:, :m]
        if function == "forward":
            linear.linear(x, weight, bias, m, "gelu", True, config=config)
        elif function == "dgrad":
            linear.linear_dgrad(dy, weight, k, config=config)
        else:
            linear.linear_wgrad_into(dy, x, weight[:m, :k], True, config=config)

    cases = []
    for config in configs:
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
        for m, k in [(128, 64)] + [(127, 65)] * (config is configs[1]):
            for function in ("forward", "dgrad", "wgrad"):
                label = f"{function} {tile} {'odd' if m % 2 else 'aligned'}"
                cases.append((label, lambda f=function, c=config, m=m, k=k: run(f, c, m, k)))
    return cases


def _row_cases(dtype) -> list[tuple[str, Callable[[], object]]]:
    """Norms at the widths where the tiling changes, column sums, embedding."""
    import torch

    from sorted_kernels.triton import embedding, layer_norm, linear, rms_norm

    weight = torch.zeros(16384, dtype=dtype)

    def layer(k):
        x, rows = torch.zeros(4, k, dtype=dtype), torch.zeros(4, 1)
        layer_norm.layer_norm(x, weight, weight, 1e-5)
        layer_norm.layer_norm_backward_into(
            x, x, rows, rows, weight, weight[:k], weight[:k], True, True
        )

    def rms(k):
        x, rows = torch.zeros(4, k, dtype=dtype), torch.zeros(4, 1)
        rms_norm.rms_norm(x, weight, 1e-5)
        rms_norm.rms_norm_backward_into(x, x, rows, weight, weight[:k], True)

    def sums(k):
        linear.bias_grad_into(torch.zeros(4, k, dtype=dtype), weight[:k], True)

    def lookup(k):
        indices, table = torch.zeros(4, dtype=torch.int64), weight.view(16, 1024)
        embedding.embedding(indices, table, k)
        embedding.embedding_backward_into(
            torch.zeros(4, k, dtype=dtype), indices, table[:, :k], True
        )

    cases = []
    for function, widths in (
        (layer, (63, 768, 8192, 16384)),
        (rms, (8192, 16384)),
        (sums, (63, 64)),
        (lookup, (63, 768)),
    ):
        cases += [(f"{function.__name__} {k}", lambda f=function, k=k: f(k)) for k in widths]
    return cases


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


def _compile_all(capability: int, dtypes: list[str]) -> list[CompiledKernel]:
    import torch
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_TargetDriver(capability))
    run, label, rows = JITFunction.run, "", {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash in rows:
            return
        registers, stack = _resources(kernel.asm["cubin"])
        found = [name for name, text in _PATTERNS.items() if re.search(text, kernel.asm["ptx"])]
        rows[kernel.hash] = CompiledKernel(
            self.fn.__name__, label, name, registers, stack,
            kernel.metadata.shared, kernel.metadata.num_warps, found,
        )  # fmt: skip

    JITFunction.run = compile_only
    for name in dtypes:
        dtype = getattr(torch, name)
        for label, call in _gemm_cases(dtype) + _row_cases(dtype):  # noqa: B007
            call()
    return list(rows.values())


if __name__ == "__main__":
    compiled = _compile_all(int(sys.argv[1]), sys.argv[2:])
    print(json.dumps([asdict(kernel) for kernel in compiled]))
