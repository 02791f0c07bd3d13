"""The plain-C++ planning code: chunk tables of staircases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sorted_kernels.staircase import Staircase

host = pytest.importorskip(
    "sorted_kernels._host", reason="the planning code was not compiled (no C++ compiler)"
)

DIFFERENT = 0  # row stride of a tensor whose operands' strides differ


@st.composite
def staircases(draw):
    """Bands of several random staircases, their shapes, and their shared row strides."""
    bands, shapes, strides = [], [], []
    for index in range(draw(st.integers(1, 4))):
        rows, cols = draw(st.integers(1, 30)), draw(st.integers(1, 30))
        diagram = Staircase(rows, cols)
        for _ in range(draw(st.integers(0, 5))):
            diagram.add(draw(st.integers(1, rows)), draw(st.integers(1, cols)))
        bands += [(index, *band) for band in diagram.bands()]
        shapes.append((rows, cols))
        strides.append(draw(st.sampled_from([DIFFERENT, cols, cols + 3])))
    return bands, shapes, strides


def visits(rectangles, shapes, strides):
    """How often each memory location of each tensor is visited by (tensor, row, rows, col, cols).

    Chunks of a band without gaps run on over the end of a row, so locations count, not indices.
    """
    pitches = [stride or cols + 5 for (_, cols), stride in zip(shapes, strides, strict=True)]
    counts = [np.zeros(shape[0] * p, int) for shape, p in zip(shapes, pitches, strict=True)]
    for tensor, row_begin, rows, col_begin, cols in rectangles:
        for row in range(row_begin, row_begin + rows):
            begin = row * pitches[tensor] + col_begin
            assert begin + cols <= counts[tensor].size
            counts[tensor][begin : begin + cols] += 1
    return counts


@settings(max_examples=2000, deadline=None)
@given(staircases(), st.integers(1, 200))
def test_chunks_cover_the_bands_exactly_once(case, chunk_elements):
    bands, shapes, strides = case
    chunks = host.chunk_table(bands, strides, chunk_elements)
    rectangles = [(tensor, begin, end - begin, 0, cols) for tensor, begin, end, cols in bands]
    expected = visits(rectangles, shapes, strides)
    for count, reference in zip(visits(chunks, shapes, strides), expected, strict=True):
        np.testing.assert_array_equal(count, reference)
    assert (chunks[:, 2] * chunks[:, 4] <= chunk_elements).all()
    assert (chunks[:, 2] * chunks[:, 4] > 0).all()


def test_contiguous_band_is_cut_as_one_range_at_aligned_places():
    chunks = host.chunk_table([(0, 3, 10, 100)], [100], 128)
    begins, lengths = chunks[:, 3], chunks[:, 4]
    assert (begins[0], begins[-1] + lengths[-1]) == (300, 1000)
    assert (begins[1:] % 128 == 0).all()
    assert len(chunks) == 1 + (1000 - 384 + 127) // 128


def test_one_dimensional_tensor_is_one_row():
    assert host.chunk_table([(0, 0, 1000, 1)], [1], 4096).tolist() == [[0, 0, 1, 0, 1000]]
    strided = host.chunk_table([(0, 0, 1000, 1)], [7], 4096)
    assert strided.tolist() == [[0, 0, 1000, 0, 1]]


def test_rows_longer_than_a_chunk_are_split():
    chunks = host.chunk_table([(0, 1, 3, 10)], [64], 4)
    assert chunks[:3].tolist() == [[0, 1, 1, 0, 4], [0, 1, 1, 4, 4], [0, 1, 1, 8, 2]]
    assert len(chunks) == 6


@pytest.mark.parametrize("band", [(1, 0, 1, 1), (-1, 0, 1, 1), (0, 2, 1, 1), (0, -1, 1, 1)])
def test_invalid_band_is_named(band):
    with pytest.raises(ValueError, match=rf"band \({band[0]}, {band[1]}, {band[2]}, {band[3]}\)"):
        host.chunk_table([band], [4], 16)


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_elements=0"):
        host.chunk_table([(0, 0, 1, 1)], [1], 0)
