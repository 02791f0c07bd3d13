"""The floors of the house: what a module may import, and what importing the package brings."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sorted_kernels"
FLOORS = [
    {"errors", "env", "submodel", "staircase", "row_widths"},
    {"reference"},
    {"triton"},
    {"ops"},
    {"optim", "nn"},
    {"models"},
    {"training", "inference", "data"},
    {"cli"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
MODULES = sorted(PACKAGE.rglob("*.py"))


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


def imports_of(path):
    """``(line, full name)`` of every import, wherever it stands in the file."""
    package = ["sorted_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def floor_of(parts):
    """The part of the house that a dotted name below the package belongs to."""
    return parts[0] if parts and parts[0] in LEVEL else None


def test_every_part_has_a_floor():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert parts - {"__init__", "__main__"} <= set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_downwards(path):
    own = floor_of([path.relative_to(PACKAGE).parts[0].removesuffix(".py")])
    for line, name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "sorted_kernels" or own is None:
            continue
        if parts[1:] == ["_host"] or parts[1:2] == ["_host"]:
            assert own not in ("nn", "optim", "models"), f"{relative(path)}:{line} imports {name}"
            continue
        target = floor_of(parts[1:])
        assert target is not None, f"{relative(path)}:{line} imports {name}, the package itself"
        allowed = target == own or LEVEL[target] < LEVEL[own]
        if LEVEL[own] == 0:  # the ground floor: submodel and staircase may use errors and env
            allowed = allowed or target in ("errors", "env")
        assert allowed, f"{relative(path)}:{line} imports {name}, which is not below {own}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if relative(p).startswith(("nn/", "models/"))], ids=relative
)
def test_layers_never_see_triton_or_the_compiled_library(path):
    for line, name in imports_of(path):
        assert "triton" not in name and "_host" not in name, f"{relative(path)}:{line}: {name}"
        assert not name.endswith(("load_compiled", "ops.library")), f"{relative(path)}:{line}"
    assert "torch.ops." not in path.read_text(), f"{relative(path)} calls an op by its raw name"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if relative(p).startswith(("ops/", "reference/"))], ids=relative
)
def test_nothing_is_made_contiguous(path):
    """Rule 1: a weight is never copied to be sliced."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "contiguous", f"{relative(path)}:{node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_env_reads_the_environment(path):
    if relative(path) == "env.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), f"{relative(path)}:{node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_stay_readable(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 450, f"{relative(path)} has {len(lines)} lines"
