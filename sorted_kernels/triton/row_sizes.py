"""The sizes of a ragged batch in device memory, as the kernels read them.

A batch of N rows is given by its runs, ``(rows, out_features, in_features)``, sorted largest first.
So the rows that use one output feature, or one input feature, are a prefix of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime.driver import driver

from sorted_kernels.triton.launch import is_aligned

Runs = Sequence[tuple[int, int, int]]

_CACHED_SHAPES = 64


class RowSizes(NamedTuple):
    """Sizes of one ragged batch; the tensors are int32, and no address in them is odd.

    Attributes:
        row_out: (N,) output features of each row; never rises.
        row_in: (N,) input features of each row; never rises.
        out_rows: (m,) how many leading rows have each output feature.
        in_rows: (k,) how many leading rows have each input feature.
        n_rows: N.
        out_features: m, the largest row's.
        in_features: k, the largest row's.
        aligned: Whether all feature counts are multiples of 16.
        in_aligned: Whether all input features are.
        stream: The CUDA stream that the tensors were made on; 0 elsewhere.
    """

    row_out: Tensor
    row_in: Tensor
    out_rows: Tensor
    in_rows: Tensor
    n_rows: int
    out_features: int
    in_features: int
    aligned: bool
    in_aligned: bool
    stream: int


_captured: dict[tuple[tuple[tuple[int, int, int], ...], torch.device], RowSizes] = {}
"""What CUDA graphs read: they hold addresses only, so it stays for as long as the process."""


def row_spans(runs: Runs) -> Iterator[tuple[slice, int, int]]:
    """Which rows each run has, and its output and input features."""
    begin = 0
    for rows, out_features, in_features in runs:
        yield slice(begin, begin + rows), out_features, in_features
        begin += rows


def row_sizes(runs: Runs, device: torch.device) -> RowSizes:
    """The sizes of a batch on a device; a shape seen before costs neither work nor a copy.

    Args:
        runs: ``(rows, out_features, in_features)`` triples, sorted, as ``RowWidths`` checks them.
        device: Where the kernels run. While a CUDA graph is captured, the shape must have been seen
            before, because a copy from the host cannot be captured.
    """
    key = tuple(runs)
    if device.type != "cuda":
        return _row_sizes(key, device)
    sizes = _row_sizes(key, device)
    if driver.active.get_current_stream(device.index) != sizes.stream:
        # The cache may drop the table while another stream still reads it.
        sizes.row_out.record_stream(torch.cuda.current_stream(device))
    if torch.cuda.is_current_stream_capturing():
        _captured[key, device] = sizes
    return sizes


@functools.lru_cache(maxsize=_CACHED_SHAPES)
def _row_sizes(runs: tuple[tuple[int, int, int], ...], device: torch.device) -> RowSizes:
    rows, out, in_ = np.asarray(runs, dtype=np.int32).T
    ends = np.cumsum(rows, dtype=np.int32)
    parts = [
        np.repeat(out, rows),
        np.repeat(in_, rows),
        np.repeat(ends[::-1], np.diff(out[::-1], prepend=0)),
        np.repeat(ends[::-1], np.diff(in_[::-1], prepend=0)),
    ]
    # Each part begins at a 16-byte address, so that kernels are compiled for nothing else.
    starts = np.cumsum([0, *(len(part) + -len(part) % 4 for part in parts)])
    table = np.zeros(starts[-1], dtype=np.int32)
    for start, part in zip(starts, parts, strict=False):
        table[start : start + len(part)] = part
    on_device = torch.from_numpy(table).to(device)
    row_out, row_in, out_rows, in_rows = (
        on_device[start : start + len(part)] for start, part in zip(starts, parts, strict=False)
    )
    stream = driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    return RowSizes(
        row_out, row_in, out_rows, in_rows, int(ends[-1]), int(out[0]), int(in_[0]),
        is_aligned(*out.tolist(), *in_.tolist()), is_aligned(*in_.tolist()), stream,
    )  # fmt: skip
