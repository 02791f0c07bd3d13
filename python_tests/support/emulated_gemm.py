"""Has the compiled GEMM's op run on CPU tensors: its device code on emulated threads."""

from __future__ import annotations

import functools

import pytest
import torch

from sorted_kernels.cuda import gemm, linear
from sorted_kernels.ops import backend
from sorted_kernels.ops.dispatch import Machine
from sorted_kernels.ops.promotion import manifest
from sorted_kernels.reference.linear import ACTIVATIONS

PROCESSORS = 6
_registered: list[torch.library.Library] = []


def _array(tensor):
    """A NumPy view; half precision as its bits."""
    if tensor is None or tensor.dtype in (torch.float32, torch.int32):
        return tensor if tensor is None else tensor.numpy()
    return tensor.view(torch.uint16).numpy()


def _triples(mode, a, b, table):
    """The runs, as (rows, m, k), that an op's arguments describe."""
    if table is None:
        other = 0 if mode == "forward" else 1
        m, k = (b.shape[other], a.shape[1]) if mode == "forward" else (a.shape[1], b.shape[other])
        return [(a.shape[0], m, k)]
    ends = table[:, 0].tolist()
    rows = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    first, second = table[:, 1].tolist(), table[:, 2].tolist()
    sizes = (second, first) if mode == "dgrad" else (first, second)
    return list(zip(rows, *sizes, strict=True))


def _native_gemm(
    mode,
    a,
    b,
    bias,
    out,
    saved,
    tiles,
    runs,
    sizes,
    tile_cols,
    split,
    slots,
    activation,
    accumulate,
):
    from sorted_kernels import _host as host

    name = gemm.MODES[mode]
    host.run_gemm(
        name, _array(a), _array(b), _array(out), _triples(name, a, b, runs),
        host.TileChoice(128, tile_cols, 64, split), half=str(a.dtype).removeprefix("torch."),
        bias=_array(bias), saved=_array(saved), activation=ACTIVATIONS[activation],
        accumulate=accumulate, sizes=_array(sizes), blocks=PROCESSORS,
    )  # fmt: skip


def _check(a, b):
    strides = [tensor.stride(0) if tensor.shape[0] > 1 else 0 for tensor in (a, b)]
    addresses = [a.data_ptr(), b.data_ptr()]
    sizes = (a.shape[0], a.shape[1], b.shape[1])
    assert gemm.supports(a.dtype, *sizes, strides, addresses, (9, 0)) is None


def _tables(mode, runs, device):
    schedule = gemm.plan(mode, runs, PROCESSORS)
    return gemm.Tables(torch.from_numpy(schedule.tiles), torch.from_numpy(schedule.runs), 0)


def install(monkeypatch):
    """Until the test ends, ``sorted_kernels.cuda`` takes CPU tensors."""
    if not _registered:
        library = torch.library.Library("sorted_kernels", "IMPL")
        library.impl("native_gemm", _native_gemm, "CPU")
        _registered.append(library)
    monkeypatch.setattr(gemm, "_check", _check)
    monkeypatch.setattr(gemm, "_tables", _tables)
    monkeypatch.setattr(gemm, "_processors", lambda device: PROCESSORS)


def hopper(device, monkeypatch):
    """Have ``sorted_kernels.cuda`` run on the device of the tests, or skip the test.

    On a machine without a GPU, CPU tensors and emulated threads stand in.
    """
    if device == "cpu":
        pytest.importorskip("sorted_kernels._host", reason="there is neither a GPU nor emulation")
        install(monkeypatch)
        return device
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is not of compute capability 9.0")
    if "90a" not in manifest().get("archs", []):
        pytest.skip("the compiled library has no kernel for sm_90a")
    return device


def dispatched(device, monkeypatch, **machine):
    """Have the public ops take the compiled GEMM where dispatch says so; a list of its calls.

    Args:
        device: What :func:`hopper` returned.
        monkeypatch: Undo it and call ``backend.reset()`` at the end.
        **machine: Other facts of the GPU that stands in.
    """
    facts = {"capability": (9, 0), "experimental": True, "built": frozenset({"cuda"})} | machine
    stand_in = Machine("cuda", **facts)
    choice = backend.Choice("cuda", "a test's")
    reference = backend.Choice("reference", "a test's")
    monkeypatch.setattr(backend, "choose", lambda op, kind: choice if op == "linear" else reference)
    monkeypatch.setattr(backend, "_machine", functools.cache(lambda device: stand_in))
    backend.reset()
    calls, run = [], linear.run_gemm

    def note(mode, a, b, out, runs, **options):
        calls.append((mode, len(runs), out.dtype))
        run(mode, a, b, out, runs, **options)

    monkeypatch.setattr(linear, "run_gemm", note)
    return calls
