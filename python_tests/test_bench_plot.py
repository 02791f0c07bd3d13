"""The benchmarks' pictures: what is drawn from measured rows."""

from dataclasses import replace

import numpy as np
import pytest

image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")

from bench import plot  # noqa: E402
from bench.rows import append_rows, read_rows  # noqa: E402
from support.bench_rows import COMMITTED, ROW  # noqa: E402

SMALL, LARGE = "N=32 M=64 K=64 m=16 k=16", "N=32 M=64 K=64 m=64 k=64"


def step(provider, sizes, p50, flops=1, **changes):
    return replace(ROW, provider=provider, sizes=sizes, p50=p50, flops=flops, **changes)


def model_step(provider, depth, p50, flops):
    sizes = f"batch=64 depth={depth} width=8"
    return step(provider, sizes, p50, flops, kernel="model_step")


ROWS = [
    step("B0", SMALL, 8.0, 1_000_000),
    step("ours", SMALL, 1.0, 1_000_000),
    step("B2", SMALL, 2.0, 1_000_000),
    step("B0", LARGE, 9.0, 16_000_000),
    step("ours", LARGE, 6.0, 16_000_000),
    step("B2", LARGE, 4.0, 16_000_000),
]


def curves(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


@pytest.fixture(scope="module")
def committed():
    return read_rows([COMMITTED])


def test_pictures_of_the_committed_results(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    plot.main([str(folder), str(COMMITTED)])
    files = [folder / f"{name}.png" for name in ("speedup", "limit_share", "step_time")]
    assert sorted(folder.iterdir()) == sorted(files)
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    for file in files:
        pixels = image.imread(file)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 600
        assert len(np.unique(pixels[::4, ::4, :3].reshape(-1, 3), axis=0)) > 20, (
            "something is drawn"
        )


def test_committed_results_fill_every_panel(committed):
    axes = plot.draw_speedup(committed).axes
    assert ["layer, 32 rows" in axes[0].get_title(), "256 rows" in axes[1].get_title()] == [
        True
    ] * 2
    for panel in axes:
        assert set(curves(panel)) == set(plot.NAMES.values())
        assert all(len(points) == 4 for points in curves(panel).values())
    times = plot.draw_step_time(committed).axes
    assert [len(curves(panel)) for panel in times] == [5, 5, 3]  # with the ideal line


def test_speedup_is_over_b0_at_the_same_size():
    (axes,) = plot.draw_speedup(ROWS).axes
    small, whole = 1 / 16, 1.0
    assert curves(axes) == {
        plot.NAMES["B0"]: [[small, 1.0], [whole, 1.0]],
        plot.NAMES["B2"]: [[small, 4.0], [whole, 2.25]],
        plot.NAMES["ours"]: [[small, 8.0], [whole, 1.5]],
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.25", "1"]


def test_a_later_row_replaces_an_earlier_one():
    (axes,) = plot.draw_speedup([*ROWS, step("ours", LARGE, 3.0)]).axes
    assert curves(axes)[plot.NAMES["ours"]][-1] == [1.0, 3.0]


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bfloat16"}, {"cache": "cold"}, {"device": "another"}],
    ids=["dtype", "cache", "device"],
)
def test_what_cannot_be_compared_is_in_panels_of_its_own(changes):
    rows = [*ROWS, *(replace(row, **changes) for row in ROWS)]
    axes = plot.draw_speedup(rows).axes
    assert len(axes) == 2 and curves(axes[0]) == curves(axes[1])
    assert len({panel.get_title() for panel in axes}) == 2
    assert len(plot.draw_step_time(rows).axes) == 2


def test_step_time_is_in_proportion_to_cost_on_the_ideal_line():
    rows = [model_step("B2", 12, 4.0, 8_000_000), model_step("B2", 3, 3.0, 2_000_000)]
    layer, model = plot.draw_step_time([*ROWS, *rows]).axes
    ideal = "ideal: time in proportion to cost"
    assert curves(layer)[plot.NAMES["ours"]] == [[1.0, 1.0], [16.0, 6.0]]
    assert curves(layer)[ideal] == [[1.0, 0.25], [16.0, 4.0]]
    assert curves(model)[ideal] == [[2.0, 1.0], [8.0, 4.0]]
    assert "residual MLP, batch 64" in model.get_title()


def test_a_contestant_alone_makes_no_panel():
    """A CSV file of ``pytest bench -k ours`` has no baseline to compare with."""
    ours = [row for row in ROWS if row.provider == "ours"]
    ours += [model_step("ours", 12, 4.0, 8), model_step("ours", 3, 3.0, 2)]
    assert plot.draw_speedup(ours) is None and plot.draw_step_time(ours) is None
    (axes,) = plot.draw_speedup([*ROWS[:3], *ROWS[3:4], *ours]).axes
    assert set(curves(axes)) == set(plot.NAMES.values()) - {plot.NAMES["B1"]}


def test_sizes_that_the_baseline_lacks_are_left_out():
    rows = [*ROWS, step("ours", "N=32 M=64 K=64 m=32 k=32", 2.0)]
    (axes,) = plot.draw_speedup(rows).axes
    assert [x for x, _ in curves(axes)[plot.NAMES["ours"]]] == [1 / 16, 1.0]


def test_only_the_pictures_asked_for(tmp_path):
    plot.main([str(tmp_path / "out"), str(COMMITTED), "--only", "step_time"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step_time.png"]


LIMITS = [
    replace(ROW, kernel="limit", provider="torch", mode="copy", metric="GB/s", p50=2.0),
    replace(ROW, kernel="limit", provider="torch", mode="matmul", metric="TFLOP/s", p50=1e-3),
]


def norm(provider, p50, **changes):
    """A kernel that must move 1 MB: 0.5 ms at 2 GB/s."""
    row = step(provider, "N=1 K=1 k=1", p50, 0, kernel="rms_norm", mode="forward")
    return replace(row, bytes=1_000_000, **changes)


def test_share_of_the_limit_is_its_time_over_the_measured_one():
    """1 MFLOP takes 1 ms at 1 GFLOP/s, which is more than the bytes' time."""
    rows = [*LIMITS, *(replace(row, bytes=1) for row in ROWS), norm("ours", 2.0)]
    layer, alone = plot.draw_limit_share(rows).axes
    found = curves(layer)
    assert found[plot.NAMES["B2"]] == [[1.0, 50.0], [16.0, 400.0]]
    assert found[plot.NAMES["B0"]] == [[1.0, 12.5], [16.0, pytest.approx(1600 / 9)]]
    assert curves(alone)[plot.NAMES["ours"]] == [[1.0, 25.0]]
    assert "rms_norm forward" in alone.get_title() and alone.get_xlabel().startswith("MB")


def test_hot_and_cold_share_a_panel():
    rows = [*LIMITS, norm("ours", 1.0), norm("ours", 2.0, cache="cold")]
    (axes,) = plot.draw_limit_share(rows).axes
    points = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "D"]
    assert points == [[[1.0, 50.0]], [[1.0, 25.0]]]


@pytest.mark.parametrize(
    "limits",
    [[], [replace(each, device="another") for each in LIMITS], [replace(LIMITS[1], dtype="int8")]],
    ids=["none", "of-another-device", "of-another-dtype"],
)
def test_without_a_limit_that_applies_there_is_no_share(limits):
    assert plot.draw_limit_share([*limits, *(replace(row, bytes=0) for row in ROWS)]) is None


def test_contestants_and_units_that_are_not_known_are_no_error():
    strange = [norm("B9", 1.0), norm("ours", 1.0, metric="thoughts/s")]
    assert plot.draw_limit_share([*LIMITS, *strange]) is None


def test_no_rows_are_no_error(tmp_path, capsys):
    append_rows(tmp_path / "rows.csv", [])
    plot.main([str(tmp_path / "out"), str(tmp_path / "rows.csv")])
    assert list((tmp_path / "out").iterdir()) == []
    assert capsys.readouterr().out.count("no rows to draw") == 3
