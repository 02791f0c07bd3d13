"""The GEMM's tile schedules: coverage, reductions, FLOPs, and their results in a model in NumPy."""

import random

import numpy as np
import pytest

from support.gemm import MODES, active, exact, random_runs, row_sizes

host = pytest.importorskip(
    "sorted_kernels._host", reason="the planning code was not compiled (no C++ compiler)"
)

modes = pytest.mark.parametrize("mode", MODES)
TILES = [(8, 8, 4), (8, 16, 4), (4, 8, 8)]


def cases(count, rows, size):
    for seed in range(count):
        rng = random.Random(seed)
        tile_m, tile_n, tile_k = rng.choice(TILES)
        choice = host.TileChoice(tile_m, tile_n, tile_k, rng.choice([1, 1, 2, 3, 5]))
        yield seed, random_runs(rng, rows, size), choice


def check_cover(mode, runs, choice):
    schedule = host.schedule_gemm(mode, runs, choice)
    m, k = row_sizes(runs)
    needed = active(mode, runs)
    cols, reds = (m, k) if mode == "forward" else (k, m)
    covered = np.zeros(needed.shape, int)
    parts = {}
    for row, row_end, col, col_end, red, red_end, _, part, count, slot in schedule.tiles:
        assert 0 < row_end - row <= choice.tile_m and 0 < col_end - col <= choice.tile_n
        assert red < red_end and red % choice.tile_k == 0
        parts.setdefault((row, row_end, col, col_end, count), []).append((red, red_end))
        assert count == 1 or 0 <= slot - part <= slot < schedule.slots
    for (row, row_end, col, col_end, count), ranges in parts.items():
        ranges = sorted(ranges)
        assert len(ranges) == count <= choice.split_k
        assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
        if mode == "wgrad":
            assert ranges[-1][1] == needed[row, col]  # the corner is used by the most rows
            covered[row:row_end, col:col_end] += 1
        else:
            assert ranges[-1][1] == reds[row:row_end].max()
            assert (cols[row:row_end] > col).all()
            covered[row:row_end, col:col_end] += needed[row:row_end, col:col_end] > 0
    np.testing.assert_array_equal(covered, needed > 0)


@modes
def test_tiles_cover_the_active_region_exactly_once(mode):
    """... over exactly the reduction that their rows need, in whole and disjoint parts."""
    for _, runs, choice in cases(1500, 40, 40):
        check_cover(mode, runs, choice)


@modes
def test_flops_are_those_of_the_rows(mode):
    for _, runs, choice in cases(1500, 60, 60):
        schedule = host.schedule_gemm(mode, runs, choice)
        assert schedule.flops == sum(2 * rows * m * k for rows, m, k in runs)


@modes
def test_longest_tiles_come_first_and_slots_are_unique(mode):
    for _, runs, choice in cases(300, 60, 60):
        schedule = host.schedule_gemm(mode, runs, choice)
        tiles = schedule.tiles
        if len(runs) > 1:
            steps = -(-(tiles[:, 5] - tiles[:, 4]) // choice.tile_k)
            assert (np.diff(steps) <= 0).all()
        slots = tiles[tiles[:, 8] > 1, 9]
        assert len(set(slots)) == len(slots) == schedule.slots


@modes
def test_one_run_is_a_run_cut_in_two(mode):
    """The device's arithmetic for uniform products and the table for ragged ones agree."""
    for _, runs, choice in cases(300, 60, 60):
        rows, m, k = max(runs[0], (2, 1, 1))
        whole = host.schedule_gemm(mode, [(rows, m, k)], choice)
        halves = host.schedule_gemm(mode, [(1, m, k), (rows - 1, m, k)], choice)
        assert sorted(whole.tiles[:, :9].tolist()) == sorted(halves.tiles[:, :9].tolist())


# --- a model of the kernel -----------------------------------------------------------------------


def box(matrix, line, element, lines, elements):
    """A tensor copy: zeros beyond the extents."""
    out = np.zeros((lines, elements))
    found = matrix[line : line + lines, element : element + elements]
    out[: found.shape[0], : found.shape[1]] = found
    return out


def clip(a, b, mode, runs, tile, red):
    """What the kernel zeroes: ``a`` (lines, reduction) and ``b`` alike, for wgrad too."""
    row, row_end, col, _, _, red_end, *_ = tile
    m, k = row_sizes(runs)
    steps = red + np.arange(a.shape[1])
    if mode == "wgrad":
        inside = steps < red_end
        at = np.where(inside, steps, 0)
        first, second = m[at] - row, k[at] - col
        used = inside & (first > 0) & (second > 0)
        a[np.arange(a.shape[0])[:, None] >= np.where(used, first, 0)] = 0
        b[np.arange(b.shape[0])[:, None] >= np.where(used, second, 0)] = 0
        return
    reds = (k if mode == "forward" else m)[row:row_end]
    a[: len(reds)][steps >= reds[:, None]] = 0
    b[:, steps >= red_end] = 0


def run_model(mode, a, b, out, runs, choice):
    """Execute a schedule as the kernel does; a and b as it reads them, NaN where it must not."""
    m, k = row_sizes(runs)
    cols = m if mode == "forward" else k
    trans_a, trans_b = mode == "wgrad", mode != "forward"
    sums = {}
    for tile in host.schedule_gemm(mode, runs, choice).tiles:
        row, row_end, col, col_end, red, red_end, clip_from, _, parts, _ = tile
        total = sums.setdefault((row, col), [np.zeros((choice.tile_m, choice.tile_n)), 0])
        for step in range(red, red_end, choice.tile_k):
            steps = choice.tile_k
            left = (
                box(a, step, row, steps, choice.tile_m).T
                if trans_a
                else box(a, row, step, choice.tile_m, steps)
            )
            right = (
                box(b, step, col, steps, choice.tile_n).T
                if trans_b
                else box(b, col, step, choice.tile_n, steps)
            )
            if step + choice.tile_k > clip_from:
                clip(left, right, mode, runs, tile, step)
            total[0] += left @ right.T
        total[1] += 1
        if total[1] < parts:
            continue
        block = total[0][: row_end - row, : min(choice.tile_n, out.shape[1] - col)]
        if mode != "wgrad":
            beyond = col + np.arange(block.shape[1]) >= cols[row:row_end, None]
            block = np.where(beyond, 0.0, block)
        out[row:row_end, col : col + block.shape[1]] += block


def operands(rng, runs):
    """x, W and dy with NaN in what no row has, and their clean copies."""
    m, k = row_sizes(runs)
    x, dy = rng.standard_normal((len(k), k[0])), rng.standard_normal((len(m), m[0]))
    x[np.arange(k[0]) >= k[:, None]] = np.nan
    dy[np.arange(m[0]) >= m[:, None]] = np.nan
    return x, rng.standard_normal((m[0], k[0])), dy


def check_model(mode, runs, choice, seed):
    x, weight, dy = operands(np.random.default_rng(seed), runs)
    wanted = exact(mode, x, weight, dy, runs)
    a, b = {"forward": (x, weight), "dgrad": (dy, weight), "wgrad": (dy, x)}[mode]
    out = np.zeros(wanted.shape)
    run_model(mode, a, b, out, runs, choice)
    np.testing.assert_allclose(out, wanted, atol=1e-12)


@modes
def test_model_computes_the_products(mode):
    for seed, runs, choice in cases(700, 40, 40):
        check_model(mode, runs, choice, seed)


def test_random_problems(ragged_runs):
    """The batches that the other implementations are tested on; FLOPs at up to forty-fold sizes."""
    rng = random.Random(str(ragged_runs))
    large = [(rows, 40 * m + 16, 40 * k + 7) for rows, m, k in ragged_runs]
    for mode in MODES:
        choice = host.TileChoice(
            *rng.choice([(16, 32, 16), (32, 16, 32)]), rng.choice([1, 1, 2, 5])
        )
        check_cover(mode, ragged_runs, choice)
        check_model(mode, ragged_runs, choice, rng.randrange(1000))
        choice = host.choose_tiles(mode, large, rng.choice([108, 132]))
        flops = host.schedule_gemm(mode, large, choice).flops
        assert flops == sum(2 * rows * m * k for rows, m, k in large)


# --- choices -------------------------------------------------------------------------------------


@modes
def test_choice_is_one_of_the_kernels_tiles(mode):
    for seed in range(200):
        rng = random.Random(seed)
        runs = random_runs(rng, 3000, 3000)
        choice = host.choose_tiles(mode, runs, rng.randint(1, 200))
        assert (choice.tile_m, choice.tile_k) == (128, 64) and choice.tile_n in (128, 256)
        assert 1 <= choice.split_k <= 16


def test_large_gemm_takes_the_largest_tile_and_thin_one_cuts_the_reduction():
    large = host.choose_tiles("forward", [(8192, 8192, 8192)], 132)
    assert (large.tile_n, large.split_k) == (256, 1)
    assert host.choose_tiles("forward", [(64, 64, 8192)], 132).split_k > 1
    assert host.choose_tiles("wgrad", [(8192, 64, 64)], 132).split_k > 1


def test_small_tiles_go_on_into_the_next_run():
    choice = host.TileChoice(8, 8, 4)
    tiles = host.schedule_gemm("forward", [(9, 8, 8), (5, 8, 4), (7, 8, 2)], choice).tiles
    assert tiles[:, :2].tolist() == [[0, 8], [8, 14], [14, 21]]
    assert tiles[:, 6].tolist() == [host.NO_CLIP, 4, 2]


def test_schedule_and_choice_print():
    choice = host.TileChoice(128, 64, 64, split_k=2)
    assert repr(choice) == "TileChoice(tile_m=128, tile_n=64, tile_k=64, split_k=2)"
    lines = str(host.schedule_gemm("forward", [(200, 64, 100)], choice)).splitlines()
    assert lines[0] == "0: out[0:128, 0:64] over [0:64], part 1 of 2"
    assert lines[-1] == "3: out[128:200, 0:64] over [64:100], part 2 of 2"
    ragged = str(host.schedule_gemm("forward", [(9, 8, 8), (5, 8, 3)], host.TileChoice(8, 8, 4)))
    assert ragged.splitlines()[-1] == "1: out[8:14, 0:8] over [0:8], masked from 3"


@pytest.mark.parametrize(
    ("mode", "runs", "message"),
    [
        ("forward", [], "runs is empty"),
        ("forward", [(1, 2, 3), (1, 3, 3)], r"runs\[1\] is \(1, 3, 3\); runs are sorted"),
        ("forward", [(0, 2, 3)], r"runs\[0\] is \(0, 2, 3\); counts are at least 1"),
        ("forward", [(2**30, 2, 3)], "below 2"),
        ("sideways", [(1, 2, 3)], "mode='sideways'; allowed are"),
    ],
)
def test_bad_runs_are_named(mode, runs, message):
    with pytest.raises(ValueError, match=message):
        host.schedule_gemm(mode, runs, host.TileChoice(8, 8, 4))


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="tile_k=0, split_k=1"):
        host.schedule_gemm("forward", [(1, 1, 1)], host.TileChoice(8, 8, 0))
    with pytest.raises(ValueError, match="processors=0"):
        host.choose_tiles("forward", [(1, 1, 1)], 0)
