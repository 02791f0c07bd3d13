"""Every Triton kernel compiled for sm_80 and sm_90 without a GPU: resources and instructions."""

from __future__ import annotations

import importlib
import pkgutil
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import sorted_kernels.triton  # noqa: E402
from support.triton_compile import (  # noqa: E402
    DTYPES,
    SHARED_MEMORY,
    compile_kernels,
    count_variants,
)

HALF = ("bfloat16", "float16")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled():
    """Kernels of both architectures; each is compiled in a process of its own."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHARED_MEMORY, pool.map(compile_kernels, SHARED_MEMORY), strict=True))


@pytest.fixture(params=sorted(SHARED_MEMORY), ids=lambda capability: f"sm_{capability}")
def capability(request):
    return request.param


def kernel_names() -> set[str]:
    """Functions named ``*_kernel`` in the package's modules."""
    names = set()
    for info in pkgutil.iter_modules(sorted_kernels.triton.__path__):
        module = importlib.import_module(f"sorted_kernels.triton.{info.name}")
        names |= {name for name in vars(module) if name.endswith("_kernel")}
    return names


def test_every_kernel_is_compiled_for_every_dtype(compiled, capability):
    pairs = {(kernel.name, kernel.dtype) for kernel in compiled[capability]}
    names = {name for name, _ in pairs}
    assert names == kernel_names()
    # A column sum of partial sums is float32 whatever the dtype is; of bias gradients it is not.
    assert pairs == {(name, dtype) for name in names for dtype in DTYPES}


def test_no_kernel_spills(compiled, capability):
    assert [kernel for kernel in compiled[capability] if kernel.spills] == []


def test_shared_memory_fits(compiled, capability):
    limit = SHARED_MEMORY[capability]
    assert [kernel for kernel in compiled[capability] if kernel.shared_memory > limit] == []


def test_half_precision_products_use_tensor_cores(compiled, capability):
    """Hopper's own ones where a tile has the 64 rows that they take."""
    products = [k for k in compiled[capability] if "linear" in k.name and k.dtype in HALF]
    short = [k for k in products if "16x64" in k.case or "decode" in k.case]
    tall = [k for k in products if k not in short]
    assert len(tall) >= 48 and len(short) >= 15
    wanted = "wgmma" if capability == 90 else "mma.sync"
    assert [kernel for kernel in tall if wanted not in kernel.instructions] == []
    assert [kernel for kernel in short if "mma.sync" not in kernel.instructions] == []


def test_half_precision_convolutions_use_tensor_cores(compiled, capability):
    """And where channels are aligned, both operands are loaded 16 bytes at a time."""
    products = [k for k in compiled[capability] if "_conv_" in k.name and k.dtype in HALF]
    assert len(products) >= 28
    wanted = "wgmma" if capability == 90 else "mma.sync"
    assert [kernel for kernel in products if wanted not in kernel.instructions] == []
    aligned = [k for k in products if "aligned" in k.case]
    assert [kernel for kernel in aligned if "cp.async.16" not in kernel.instructions] == []


def test_float32_products_are_exact_unless_asked(compiled, capability):
    products = [k for k in compiled[capability] if "linear" in k.name and k.dtype == "float32"]
    on_tensor_cores = {k.case for k in products if {"wgmma", "mma.sync"} & set(k.instructions)}
    assert on_tensor_cores == {"forward 64x64x16 tf32"}


def test_attention_uses_tensor_cores(compiled, capability):
    """float32 too: three products of TF32 parts, because exact ones would spill."""
    kernels = [k for k in compiled[capability] if k.name.startswith("_attention")]
    assert len(kernels) == 21
    half = "wgmma" if capability == 90 else "mma.sync"
    assert [k for k in kernels if k.dtype in HALF and half not in k.instructions] == []
    assert [k for k in kernels if not {"wgmma", "mma.sync"} & set(k.instructions)] == []


def test_loads_of_products_are_16_bytes_and_asynchronous(compiled, capability):
    """Odd sizes too: their tiles inside the matrix have no mask."""
    products = [k for k in compiled[capability] if "linear" in k.name]
    assert [kernel for kernel in products if "cp.async.16" not in kernel.instructions] == []


def test_no_kernel_needs_atomics(compiled, capability):
    assert [kernel for kernel in compiled[capability] if "atom" in kernel.instructions] == []


@pytest.mark.parametrize(
    "sizes",
    [
        [(3, 5, 7), (64, 17, 33), (31, 255, 127), (2, 201, 2)],
        [(3, 16, 32), (64, 256, 64), (1, 48, 240)],
    ],
    ids=["odd", "aligned"],
)
def test_sizes_do_not_recompile(sizes):
    assert set(count_variants(sizes).values()) == {1}
