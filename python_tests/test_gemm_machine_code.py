"""What the compiler made of the CUDA GEMM: tensor cores, tensor copies, no read of gradients."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_native_build import ROOT, find_nvcc, needs_nvcc, needs_source

from sorted_kernels.ops.library import COMPILED
from sorted_kernels.ops.promotion import manifest

KERNELS = 16  # forward, dgrad, wgrad into half precision and float32; two dtypes; two tiles


def find_cuobjdump():
    """The CUDA toolkit's, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    if shutil.which("cuobjdump") is None and triton is not None and triton.origin:
        bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        return str(bundled) if bundled.is_file() else None
    return shutil.which("cuobjdump")


def wanted_copies(name):
    """Boxes a reduction step: one of an operand along the reduction, else one each 64 rows."""
    trans_a, trans_b, cols = re.search(r"Lb([01])ELb([01])ELi(128|256)E", name).groups()
    return (2 if trans_a == "1" else 1) + (int(cols) // 64 if trans_b == "1" else 1)


@pytest.fixture(scope="module")
def sass():
    """Machine code of each GEMM kernel in the compiled library, by name."""
    if find_cuobjdump() is None:
        pytest.skip("cuobjdump is not installed")
    if "90a" not in manifest().get("archs", []):
        pytest.skip("nothing was compiled for sm_90a")
    command = [find_cuobjdump(), "-sass", COMPILED]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = (part.partition("\n") for part in text.split("Function : ")[1:])
    return {name: body for name, _, body in functions if "GemmSm90" in name}


def test_kernels_use_tensor_cores_and_tensor_copies_and_no_local_memory(sass):
    assert len(sass) == KERNELS
    for name, body in sass.items():
        cols = re.search(r"ELi(128|256)E", name)[1]
        kind = "F32.BF16" if "8BFloat16" in name else "F32 "
        assert len(re.findall(rf"HGMMA\.64x{cols}x16\.{kind}", body)) == 4, name
        assert len(re.findall(r"UTMALDG\.2D", body)) == wanted_copies(name), name
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name} uses local memory"
        assert not re.search(r"\bHMMA\b", body), name


@needs_nvcc
@needs_source
def test_float32_gradients_are_added_to_and_never_read(tmp_path):
    """The only floats that those kernels load are partial sums, past the L1 cache (.cg)."""
    ptx = tmp_path / "gemm.ptx"
    command = [find_nvcc(), "-std=c++17", "-O3", "-arch=sm_90a", "-ptx", "-I", ROOT / "csrc"]
    subprocess.run([*command, ROOT / "csrc/kernels/gemm_sm90.cu", "-o", ptx], check=True)
    kernels = ptx.read_text().split(".entry ")[1:]
    assert len(kernels) == KERNELS
    gradients = [text for text in kernels if re.search(r"(BFloat|Float)16EfLb1", text[:400])]
    assert len(gradients) == 4
    for text in gradients:
        assert "red.global.add.v4.f32" in text and "red.global.add.f32" in text
        loads = set(re.findall(r"\bld\.(?:volatile\.)?global\S*", text))
        assert loads == {"ld.global.u32", "ld.global.cg.v4.f32"}
        assert not re.search(r"atom\.global\.\S*f32", text)
