"""Staircases against boolean masks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sorted_kernels import Staircase

ROWS, COLS = 7, 9
rectangles = st.lists(st.tuples(st.integers(1, ROWS), st.integers(1, COLS)), max_size=8)


def mask_of(corners):
    mask = torch.zeros(ROWS, COLS, dtype=torch.bool)
    for m, k in corners:
        mask[:m, :k] = True
    return mask


def made(corners):
    staircase = Staircase(ROWS, COLS)
    for m, k in corners:
        staircase.add(m, k)
    return staircase


@given(rectangles)
def test_bands_are_disjoint_and_complete(corners):
    staircase, mask = made(corners), mask_of(corners)
    counts = torch.zeros(ROWS, COLS, dtype=torch.int64)
    for begin, end, cols in staircase.bands():
        assert 0 <= begin < end <= ROWS and 1 <= cols <= COLS
        counts[begin:end, :cols] += 1
    assert torch.equal(counts, mask.long())
    begins = [begin for begin, _, _ in staircase.bands()]
    assert begins == sorted(begins)


@given(rectangles)
def test_extents_area_truth(corners):
    staircase, mask = made(corners), mask_of(corners)
    assert staircase.extents() == mask.sum(1).tolist()
    assert staircase.area == int(mask.sum())
    assert bool(staircase) == bool(mask.any())


@given(rectangles, st.integers(1, ROWS), st.integers(1, COLS))
def test_covers_and_within(corners, m, k):
    staircase, mask = made(corners), mask_of(corners)
    assert staircase.covers(m, k) == bool(mask[:m, :k].all())
    inside = mask_of([(m, k)])
    assert staircase.within(m, k) == (not (mask & ~inside).any())


@given(rectangles)
def test_corners_are_few_and_in_order(corners):
    found = made(corners).corners
    assert len(found) <= min(len(corners), ROWS, COLS)
    assert [m for m, _ in found] == sorted({m for m, _ in found}, reverse=True)
    assert [k for _, k in found] == sorted({k for _, k in found})


@given(rectangles, st.randoms(use_true_random=False))
def test_equality_does_not_depend_on_the_order(corners, random):
    shuffled = list(corners)
    random.shuffle(shuffled)
    assert made(corners) == made(shuffled)
    assert (made(corners) == made([*corners, (ROWS, COLS)])) == bool(mask_of(corners).all())
    assert made([]) != Staircase(ROWS + 1, COLS) and made([]) != "staircase"


@given(rectangles, rectangles)
def test_update_clear_cover_all(first, second):
    staircase = made(first)
    other = made(second)
    staircase.update(other.corners)
    assert staircase == made(first + second)
    assert other == made(second)
    staircase.clear()
    assert not staircase and staircase.bands() == [] and staircase.extents() == [0] * ROWS
    staircase.add(2, 3)
    staircase.cover_all()
    assert staircase.area == ROWS * COLS and staircase.covers(ROWS, COLS)
    assert other == made(second)


def test_repr_names_shape_and_corners():
    assert repr(made([(2, 5), (4, 1)])) == "Staircase(7x9, corners=[(4, 1), (2, 5)])"
