"""Build: decides by the tools that are there, never by a GPU, what CMake shall compile.

``SORTED_KERNELS_BUILD`` forces the decision: ``auto`` (default), ``python`` (compile nothing),
``cpu`` (no CUDA kernels), ``cuda`` (fail without nvcc). ``SORTED_KERNELS_ARCHS`` is a list of CUDA
architectures, by default ``80;90a``. A compiler that is there and fails is an error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.resolve()
PACKAGE = "sorted_kernels"
KERNELS, HOST, MANIFEST = "_kernels", "_host", "_build.json"
CHOICES = ("auto", "python", "cpu", "cuda")


def find_tool(name: str) -> str | None:
    """Path of a program: beside this Python (where pip puts cmake and ninja), or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def find_nvcc() -> str | None:
    """Path of nvcc: on PATH, or where CUDA_HOME or CUDA_PATH points."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and os.access(Path(home, "bin", "nvcc"), os.X_OK):
            return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def missing_for_cpp() -> list[str]:
    """What is not there of the things that compiling C++ takes."""
    missing = [tool for tool in ("cmake", "ninja") if find_tool(tool) is None]
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        missing.append("a C++ compiler")
    missing += [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
    if not sys.platform.startswith("linux"):
        missing.append(f"support for {sys.platform}")
    return missing


@dataclass(frozen=True)
class BuildPlan:
    """What to build, and why not more."""

    kind: str  # "python", "cpu" or "cuda"
    reason: str = ""

    @property
    def summary(self) -> str:
        """One line for people."""
        contents = {
            "python": "pure Python, nothing compiled",
            "cpu": "CPU kernels, no CUDA kernels",
            "cuda": "CPU and CUDA kernels",
        }[self.kind]
        return f"sorted_kernels build: {contents}" + (f" ({self.reason})" if self.reason else "")


def make_plan() -> BuildPlan:
    """Decide what to build."""
    choice = os.environ.get("SORTED_KERNELS_BUILD", "auto").strip().lower() or "auto"
    if choice not in CHOICES:
        raise SetupError(f"SORTED_KERNELS_BUILD={choice!r}; allowed are {', '.join(CHOICES)}")
    if choice == "python":
        return BuildPlan("python", "SORTED_KERNELS_BUILD=python")
    missing = missing_for_cpp()
    if missing and choice == "auto":
        return BuildPlan("python", "missing: " + ", ".join(missing))
    if missing:
        raise SetupError(f"SORTED_KERNELS_BUILD={choice}, but missing: {', '.join(missing)}")
    if choice == "cpu":
        return BuildPlan("cpu", "SORTED_KERNELS_BUILD=cpu")
    if find_nvcc() is None:
        if choice == "cuda":
            raise SetupError("SORTED_KERNELS_BUILD=cuda, but nvcc is not on PATH nor in CUDA_HOME")
        return BuildPlan("cpu", "nvcc is not on PATH nor in CUDA_HOME")
    return BuildPlan("cuda")


def cmake_options(plan: BuildPlan) -> list[str]:
    """Arguments that tell CMake where everything is."""
    torch = importlib.util.find_spec("torch")
    pybind11 = importlib.util.find_spec("pybind11")
    assert torch and torch.origin and pybind11 and pybind11.origin  # missing_for_cpp has looked
    options = {
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": Path(pybind11.origin).parent / "share" / "cmake" / "pybind11",
        "SORTED_KERNELS_TORCH_DIR": Path(torch.origin).parent,
        "SORTED_KERNELS_TORCH_VERSION": importlib.metadata.version("torch"),
        "SORTED_KERNELS_CUDA": "ON" if plan.kind == "cuda" else "OFF",
    }
    if plan.kind == "cuda":
        archs = os.environ.get("SORTED_KERNELS_ARCHS", "").replace(",", ";").replace(" ", "")
        options["SORTED_KERNELS_ARCHS"] = archs or "80;90a"
        options["CMAKE_CUDA_COMPILER"] = find_nvcc()
    return [f"-D{name}={value}" for name, value in options.items()]


class CMakeBuild(build_ext):
    """Runs CMake and hands what it built to setuptools."""

    plan: BuildPlan

    def get_ext_filename(self, fullname: str) -> str:
        """The kernels have no Python symbol, so their name carries no Python tag either."""
        if fullname.rpartition(".")[2] == KERNELS:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        """Configure and compile, incrementally in ``build/``, and place the results."""
        tag = f"{sys.implementation.cache_tag}-{self.plan.kind}"
        build = ROOT / "build" / f"cmake-{tag}"
        cmake = find_tool("cmake")
        assert cmake is not None  # missing_for_cpp has looked
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *cmake_options(self.plan)]
        jobs = str(self.parallel or len(os.sched_getaffinity(0)))
        for command in (configure, [cmake, "--build", build, "--parallel", jobs]):
            if subprocess.run(command).returncode != 0:
                raise SetupError(f"{self.plan.summary}: failed, see the output above")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(build / target.name, target)
        shutil.copy2(build / MANIFEST, target.parent / MANIFEST)

    def copy_extensions_to_source(self) -> None:
        """For an editable install, also put the manifest into the source tree."""
        super().copy_extensions_to_source()
        shutil.copy2(Path(self.build_lib, PACKAGE, MANIFEST), ROOT / PACKAGE / MANIFEST)


class PurePython(build_py):
    """Drops what an earlier editable build left in the source tree: it would be loaded."""

    def run(self) -> None:
        """Copy the package's Python files, as always."""
        if self.editable_mode:
            for pattern in (f"{KERNELS}.so", f"{HOST}.*so", MANIFEST):
                for path in (ROOT / PACKAGE).glob(pattern):
                    path.unlink()
        super().run()


def main() -> None:
    """Build what the machine can build."""
    plan = CMakeBuild.plan = make_plan()
    print(plan.summary, file=sys.stderr)
    if plan.kind == "python":
        setup(cmdclass={"build_py": PurePython})
        return
    extensions = [Extension(f"{PACKAGE}.{name}", sources=[]) for name in (KERNELS, HOST)]
    setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})


main()
