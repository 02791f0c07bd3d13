"""The two pictures: what is written in them, and that they touch no global state."""

import math
import subprocess
import sys

import pytest

from sorted_kernels import CheckpointError, OptionError, Submodel, SubmodelSpace
from sorted_kernels.inference import Results, Row, cost_plot, heat_map, plots

matplotlib = pytest.importorskip("matplotlib")


def results_of(metric="accuracy", higher=True, **sizes):
    rows = []
    for i, submodel in enumerate(SubmodelSpace(**sizes)):
        size = math.prod(submodel.values())
        rows.append(Row(submodel, 1 - 0.9 / (1 + i), size, 10 * size))
    return Results(rows, metric=metric, higher_is_better=higher)


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved."""
    saved = []
    original = plots._save

    def save(figure, path):
        saved.append(figure)
        original(figure, path)

    monkeypatch.setattr(plots, "_save", save)
    return saved


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_heat_map_has_metric_and_recovery_in_every_cell(tmp_path, figures):
    results = results_of(depth=range(1, 13), width=range(1, 9))
    heat_map(results, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    written = texts(figure)
    assert len(written) == 2 * 96
    assert written[:2] == ["10.00", "10%"]
    assert written[-2:] == [results.format_metric(results.best), "100%"]
    assert written.count("100%") == 1  # others are rounded to 99% at most
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == (
        "width", "depth", "accuracy (%)",
    )  # fmt: skip


def test_heat_map_text_contrasts_with_its_cell(tmp_path, figures):
    heat_map(results_of(depth=range(1, 17), width=range(10, 101, 10)), tmp_path / "map.png")
    axes = figures[0].axes[0]
    image = axes.images[0]
    for text in axes.texts:
        column, row = text.xy
        background = luminance(image.cmap(image.norm(image.get_array()[row, column])))
        ink = luminance(matplotlib.colors.to_rgba(text.get_color()))
        light, dark = max(background, ink), min(background, ink)
        assert (light + 0.05) / (dark + 0.05) > 3.5


def luminance(colour):
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_heat_map_of_a_loss_is_dark_where_it_is_low(tmp_path, figures):
    heat_map(results_of("loss", False, depth=[1, 2], width=[1, 2]), tmp_path / "map.png")
    image = figures[0].axes[0].images[0]
    values = image.get_array()
    assert luminance(image.cmap(image.norm(values.min()))) < 0.1
    assert luminance(image.cmap(image.norm(values.max()))) > 0.8


@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [
        ("depth", range(1, 13), (12, 1)),
        ("width", range(1, 9), (1, 8)),
        ("ffn", [3, 4], (2, 1)),
        ("depth", [1], (1, 1)),
    ],
    ids=["depth", "width", "ffn", "one-submodel"],
)
def test_heat_map_of_one_dimension(tmp_path, figures, name, sizes, shape):
    heat_map(results_of(**{name: sizes}), tmp_path / "map.png")
    axes = figures[0].axes[0]
    assert axes.images[0].get_array().shape == shape
    labels = (axes.get_ylabel(), axes.get_xlabel())
    assert labels == ((name, "") if shape[1] == 1 else ("", name))


def test_heat_map_of_three_dimensions_shows_the_best_and_says_so(tmp_path, figures):
    results = results_of(depth=[1, 2], width=[1, 2], heads=[1, 2, 4])
    heat_map(results, tmp_path / "map.png", title="Mine")
    (figure,) = figures
    best = [r for r in results if r.submodel["heads"] == 4]
    assert texts(figure)[::2] == [results.format_metric(r) for r in best]
    assert figure.axes[0].get_title() == "Mine\n(best over heads)"
    heat_map(results, tmp_path / "map.png", rows="heads", cols="depth")
    assert figures[1].axes[0].images[0].get_array().shape == (3, 2)


def test_heat_map_of_a_list_leaves_missing_cells_empty(tmp_path, figures):
    rows = [Row(Submodel(depth=d, width=d), 0.5, 1, 1) for d in (1, 2)]
    heat_map(Results(rows), tmp_path / "map.png")
    assert len(texts(figures[0])) == 4


def test_nan_is_written_as_such(tmp_path, figures):
    rows = [Row(Submodel(depth=d), m, 1, 1) for d, m in ((1, math.nan), (2, 0.5))]
    heat_map(Results(rows), tmp_path / "map.png")
    assert texts(figures[0]) == ["nan", "-", "50.00", "100%"]
    cost_plot(Results(rows), tmp_path / "cost.png")


def test_cost_plot_marks_the_front_and_the_selected(tmp_path, figures):
    results = results_of(depth=range(1, 13), width=range(1, 9))
    chosen = Submodel(depth=7, width=5)
    cost_plot(results, tmp_path / "cost.png", select=chosen)
    axes = figures[0].axes[0]
    front = results.pareto()
    line = axes.lines[0]
    assert list(line.get_xdata()) == [r.flops for r in front]
    assert list(line.get_ydata()) == pytest.approx([100 * r.metric for r in front])
    assert len(axes.collections[0].get_offsets()) == 96 - len(front)
    assert axes.get_xscale() == "log"
    (note,) = axes.texts
    assert note.get_text().startswith("depth=7, width=5\naccuracy ")
    assert note.xy == (350, pytest.approx(100 * results[chosen].metric))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_note_covers_neither_the_front_nor_the_legend(tmp_path, figures, metric):
    rows = []
    for submodel in SubmodelSpace(depth=range(1, 13), width=range(1, 9)):
        size = submodel["depth"] * submodel["width"] ** 2
        value = size**0.3 / 20
        rows.append(Row(submodel, value if metric == "accuracy" else 1 / value, size, size))
    results = Results(rows, metric=metric, higher_is_better=metric == "accuracy")
    cost_plot(results, tmp_path / "cost.png", select=results[-3])
    axes = figures[0].axes[0]
    note, legend = axes.texts[0].get_bbox_patch().get_window_extent(), axes.get_legend()
    front = axes.transData.transform(axes.lines[0].get_xydata())
    assert not any(note.contains(x, y) for x, y in front)
    assert not note.overlaps(legend.get_window_extent())


def test_cost_plot_is_linear_where_costs_are_close(tmp_path, figures):
    cost_plot(results_of(depth=[1, 2, 3]), tmp_path / "cost.svg", cost="parameters")
    assert figures[0].axes[0].get_xscale() == "linear"
    assert (tmp_path / "cost.svg").read_text().startswith("<?xml")


def test_wrong_arguments(tmp_path):
    results = results_of(depth=[1, 2], width=[1, 2])
    picture = tmp_path / "p.png"
    with pytest.raises(OptionError, match=r"rows='heads'.*\['depth', 'width'\]"):
        heat_map(results, picture, rows="heads")
    with pytest.raises(OptionError, match="both 'depth'"):
        heat_map(results, picture, rows="depth", cols="depth")
    with pytest.raises(OptionError, match="'xyz'.*png"):
        heat_map(results, tmp_path / "p.xyz")
    with pytest.raises(OptionError, match="'watts'"):
        cost_plot(results, picture, cost="watts")
    with pytest.raises(OptionError, match="not among"):
        cost_plot(results, picture, select=Submodel(depth=9, width=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        cost_plot(results, tmp_path / "file" / "p.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_importing_loads_neither_matplotlib_nor_rich_and_drawing_no_pyplot(tmp_path):
    code = f"""
import sys
from sorted_kernels import Submodel
from sorted_kernels.inference import Results, Row, heat_map
assert "matplotlib" not in sys.modules and "rich" not in sys.modules
heat_map(Results([Row(Submodel(depth=1), 0.5, 1, 1)]), {str(tmp_path / "p.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
