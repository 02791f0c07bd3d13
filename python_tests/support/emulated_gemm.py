"""Has the compiled GEMM's op run on CPU tensors: its device code on emulated threads."""

from __future__ import annotations

import torch

from sorted_kernels.cuda import gemm
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


def _tables(mode, runs, device, stream):
    schedule = gemm.plan(mode, runs, PROCESSORS)
    return torch.from_numpy(schedule.tiles), torch.from_numpy(schedule.runs)


def install(monkeypatch):
    """Until the test ends, ``sorted_kernels.cuda`` takes CPU tensors."""
    if not _registered:
        library = torch.library.Library("sorted_kernels", "IMPL")
        library.impl("native_gemm", _native_gemm, "CPU")
        _registered.append(library)
    monkeypatch.setattr(gemm, "_check", _check)
    monkeypatch.setattr(gemm, "_tables", _tables)
    monkeypatch.setattr(gemm, "_processors", lambda device: PROCESSORS)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream)


class _Stream:
    cuda_stream = 0
