"""The build: what it decides to compile, and what is in the compiled library."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sorted_kernels.ops import library, optimizer

ROOT = Path(__file__).parent.parent
PACKAGE = Path(library.__file__).parent.parent
CUDA_FILES = sorted((ROOT / "csrc").rglob("*.cu"))
ARCHS = ["sm_80", "sm_90a"]

needs_library = pytest.mark.skipif(
    not library.load_compiled(), reason="the compiled library is absent"
)
needs_source = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the tests run without the source tree"
)


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH nor in CUDA_HOME")


def test_manifest_says_what_the_library_holds():
    manifest = PACKAGE / "_build.json"
    assert manifest.is_file() == library.COMPILED.is_file()
    if not manifest.is_file():
        pytest.skip("nothing was compiled, and there is no manifest to say otherwise")
    content = json.loads(manifest.read_text())
    assert set(content) == {"cuda", "archs", "nvcc", "cxx", "torch", "version", "sources"}
    assert bool(content["sources"]) == content["cuda"]
    if library.load_compiled():
        assert content["cuda"] == optimizer._has_cuda_kernels()
    assert bool(content["archs"]) == bool(content["nvcc"]) == content["cuda"]


@needs_library
@pytest.mark.parametrize("name", ["staircase_adamw_", "staircase_sgd_"])
def test_library_registers_its_kernels(name):
    def has_kernel(op, key):
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"sorted_kernels::{op}", key)

    assert has_kernel(name, "CPU")
    assert has_kernel(f"native_{name}", "CUDA") == optimizer._has_cuda_kernels()


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_library_needs_only_the_stable_interface():
    """No Python symbol and no C++ symbol of torch: one build serves every version of both."""
    output = subprocess.check_output(["nm", "-D", "-u", library.COMPILED], text=True)
    symbols = [line.split()[-1] for line in output.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [s for s in symbols if s.startswith(("Py", "_Py", "cuda", "_ZN2at", "_ZN3c10"))]
    assert not [s for s in symbols if s.startswith(("_ZN5torch", "_ZNK5torch", "_ZNK2at"))]


@needs_library
def test_fallback_is_there_without_the_library():
    """With the library switched off, the same op runs, in the same process layout a user has."""
    script = (
        "import torch, sorted_kernels.ops.optimizer as o\n"
        "assert not o.use_native('cpu')\n"
        "p, g = torch.ones(4, 4), torch.ones(4, 4)\n"
        "torch.ops.sorted_kernels.staircase_sgd_([p], [g], [], [], [0, 0, 2, 3], 0.5, 0.0, 0.0,"
        " False, False, True)\n"
        "assert p.sum() == 13 and g.sum() == 10\n"
    )
    result = run_python("-W", "error", "-c", script, SORTED_KERNELS_NO_LIBRARY="1")
    assert result.returncode == 0, result.stderr


def run_python(*args, cwd=PACKAGE.parent, **env):
    environment = {**os.environ, **env}
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True
    )


@needs_nvcc
@needs_source
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", CUDA_FILES, ids=lambda path: path.name)
def test_cuda_file_compiles_without_spills(source, arch, tmp_path):
    command = [find_nvcc(), "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin"]
    command += ["--fmad=false", "-I", ROOT / "csrc", source, "-o", tmp_path / "kernel.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr
    )
    assert len(usage) == result.stderr.count("Compiling entry function") > 0
    assert set(usage) == {("0", "0", "0")}, result.stderr


@needs_nvcc
@needs_source
def test_optimizer_kernel_moves_sixteen_bytes_at_a_time(tmp_path):
    """In the SASS of a vector loop every operand is loaded and stored whole; PTX shows as much."""
    ptx = tmp_path / "kernel.ptx"
    command = [find_nvcc(), "-std=c++17", "-O3", "-arch=sm_90a", "-ptx", "-I", ROOT / "csrc"]
    subprocess.run([*command, ROOT / "csrc/kernels/optimizer.cu", "-o", ptx], check=True)
    kernels = ptx.read_text().split(".entry ")[1:]
    assert len(kernels) == 18  # six dtype pairs of AdamW, SGD and SGD with momentum
    for kernel in kernels:
        loads = re.findall(r"ld\.global\.v(?:4\.[a-z]32|2\.[a-z]64)", kernel)
        stores = re.findall(r"st\.global\.v(?:4\.[a-z]32|2\.[a-z]64)", kernel)
        operands = 4 if "5AdamW" in kernel else 3 if "Lb1E" in kernel else 2
        assert len(loads) >= operands and len(stores) >= operands, kernel.partition("(")[0]


# --- setup.py's decision -------------------------------------------------------------------------


def path_with(tmp_path, *tools):
    """A PATH on which only these programs are."""
    for tool in tools:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"{tool} is not installed")
        (tmp_path / tool).symlink_to(found)
    return str(tmp_path)


def ask_setup(path, **env):
    pytest.importorskip("setuptools")
    env = {"CUDA_HOME": "", "CUDA_PATH": "", "CXX": "", "SORTED_KERNELS_BUILD": ""} | env
    return run_python("setup.py", "--name", cwd=ROOT, PATH=path, **env)


@needs_source
def test_without_a_compiler_the_build_is_pure_python_and_says_so(tmp_path):
    result = ask_setup(path_with(tmp_path))
    assert result.returncode == 0
    assert "pure Python, nothing compiled (missing: " in result.stderr
    assert "a C++ compiler" in result.stderr


@needs_source
def test_without_nvcc_the_build_has_no_cuda_kernels_and_says_so(tmp_path):
    pytest.importorskip("pybind11")
    result = ask_setup(path_with(tmp_path, "g++", "cmake", "ninja"))
    assert "CPU kernels, no CUDA kernels (nvcc is not on PATH nor in CUDA_HOME)" in result.stderr


@needs_source
@pytest.mark.parametrize(
    "choice, message",
    [
        ("cuda", "SORTED_KERNELS_BUILD=cuda, but "),
        ("cpu", "SORTED_KERNELS_BUILD=cpu, but missing: "),
        ("fast", "SORTED_KERNELS_BUILD='fast'; allowed are auto, python, cpu, cuda"),
    ],
)
def test_forced_build_that_cannot_be_is_an_error(tmp_path, choice, message):
    result = ask_setup(path_with(tmp_path), SORTED_KERNELS_BUILD=choice)
    assert result.returncode != 0 and message in result.stderr


@pytest.fixture
def source_copy(tmp_path):
    """A copy of the source tree, without anything that was built."""
    pytest.importorskip("pybind11")
    if shutil.which("g++") is None or shutil.which("cmake") is None:
        pytest.skip("no C++ compiler or no cmake")
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "cmake", "csrc", "sorted_kernels"):
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy(source, target)
    return tmp_path


@needs_source
def test_compiler_that_fails_is_an_error(source_copy):
    result = run_python(
        "setup.py", "build", cwd=source_copy, SORTED_KERNELS_BUILD="auto", CXX=shutil.which("false")
    )
    assert result.returncode != 0 and "failed, see the output above" in result.stderr


@needs_source
@pytest.mark.slow
def test_build_with_a_cpp_compiler_alone_works(source_copy):
    result = run_python("setup.py", "build", cwd=source_copy, SORTED_KERNELS_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = (source_copy / "build").glob("lib.*")
    assert not json.loads((built / "sorted_kernels/_build.json").read_text())["cuda"]
    script = (
        "from sorted_kernels import _host\n"
        "import sorted_kernels.ops.optimizer as o\n"
        "assert o.use_native('cpu') and not o._has_cuda_kernels()\n"
    )
    result = run_python("-c", script, cwd=built, PYTHONPATH=str(built))
    assert result.returncode == 0, result.stderr
