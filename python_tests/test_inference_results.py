"""The table of results: order, recovery, Pareto front, files."""

import math

import pytest

from sorted_kernels import CheckpointError, OptionError, Submodel
from sorted_kernels.inference import Results, Row, select


def row(depth, width, metric, flops, latency=None):
    return Row(Submodel(depth=depth, width=width), metric, flops * 3, flops, latency)


ROWS = [
    row(2, 2, 0.90, 400, 4.0),
    row(1, 1, 0.50, 100, 1.0),
    row(1, 2, 0.80, 200, 2.5),
    row(2, 1, 0.70, 200, 2.0),
]


@pytest.fixture
def results():
    return Results(ROWS)


def flops_of(rows):
    return [r.flops for r in rows]


def test_rows_are_sorted_and_indexable_by_place_and_submodel(results):
    sizes = [tuple(r.submodel.values()) for r in results]
    assert sizes == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len(results) == 4 and results[-1] is ROWS[0]
    assert results[Submodel(width=1, depth=2)] is ROWS[3]


def test_rows_are_sorted_by_the_dimensions_as_given_not_by_their_names():
    rows = [Row(Submodel(width=w, depth=d), 0.5, 1, 1) for w in (2, 1) for d in (2, 1)]
    order = [(r.submodel.width, r.submodel.depth) for r in Results(rows)]
    assert order == [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    "rows",
    [[], [ROWS[0], ROWS[0]], [ROWS[0], Row(Submodel(depth=1), 0.5, 1, 1)]],
    ids=["empty", "twice", "mixed-dimensions"],
)
def test_bad_rows(rows):
    with pytest.raises(OptionError, match="rows"):
        Results(rows)


def test_best_and_recovery_of_an_accuracy(results):
    assert results.best is ROWS[0]
    assert results.recovery(ROWS[0]) == 100
    assert results.recovery(ROWS[1]) == pytest.approx(100 * 5 / 9)


def test_best_and_recovery_of_a_loss():
    results = Results(ROWS, metric="loss", higher_is_better=False)
    assert results.best is ROWS[1]
    assert results.recovery(ROWS[0]) == pytest.approx(100 * 5 / 9)


def test_best_of_equals_is_the_cheapest():
    assert Results([row(2, 2, 0.9, 400), row(1, 2, 0.9, 200)]).best.flops == 200


def test_nan_is_never_the_best_and_recovers_nothing():
    bad = row(1, 1, math.nan, 100)
    for higher in (True, False):
        results = Results([bad, row(2, 2, 0.1, 400)], higher_is_better=higher)
        assert results.best.flops == 400 and math.isnan(results.recovery(bad))
        assert flops_of(results.pareto()) == [400]


@pytest.mark.parametrize(
    ("best", "other", "higher", "expected"),
    [(0.0, 0.5, False, 0.0), (0.0, -1.0, True, math.nan), (-1.0, -2.0, True, math.nan)],
)
def test_recovery_where_the_best_is_not_positive(best, other, higher, expected):
    results = Results([row(1, 1, best, 1), row(1, 2, other, 2)], higher_is_better=higher)
    assert results.recovery(results[1]) == pytest.approx(expected, nan_ok=True)
    assert results.recovery(results[0]) == 100


def test_pareto_front_leaves_out_what_another_row_beats(results):
    assert flops_of(results.pareto()) == [100, 200, 400]
    assert results.pareto()[1] is ROWS[2]  # as cheap as (2, 1), and better
    assert ROWS[3] in results.pareto("latency_ms")  # by time it is cheaper


def test_pareto_of_an_unknown_or_unmeasured_cost(results):
    with pytest.raises(OptionError, match="'watts'.*flops, parameters, latency_ms"):
        results.pareto("watts")
    with pytest.raises(OptionError, match="latency=True"):
        Results([row(1, 1, 0.5, 1)]).pareto("latency_ms")


def test_printed_table_has_every_row_under_aligned_titles(results):
    lines = str(results).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    titles = ["depth", "width", "accuracy (%)", "recovery (%)", "parameters", "FLOPs"]
    assert all(title in lines[0] for title in titles) and "latency (ms)" in lines[0]
    assert lines[4].split() == ["2", "2", "90.00", "100.0", "1,200", "400", "4.000"]


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_files_give_back_what_was_written(results, tmp_path, kind):
    path = tmp_path / "new folder" / f"results.{kind}"
    loss = Results(
        [row(1, 1, 1 / 3, 10**15), row(1, 2, 1e-17, 2)], metric="a, b", higher_is_better=False
    )
    for table in (results, loss):
        getattr(table, f"to_{kind}")(path)
        assert getattr(Results, f"from_{kind}")(path) == table
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_metric_that_is_no_number_survives_the_file(tmp_path, kind):
    path = tmp_path / "r"
    getattr(Results([row(1, 1, math.nan, 1)]), f"to_{kind}")(path)
    assert math.isnan(getattr(Results, f"from_{kind}")(path)[0].metric)


GOOD_CSV = "depth,metric,higher_is_better,value,parameters,flops,latency_ms\n"
BAD_FILES = {
    "json-empty": ("json", "", "damaged"),
    "json-list": ("json", "[]", "format"),
    "json-foreign": ("json", '{"format": "other"}', "format"),
    "json-version": ("json", '{"format": "sorted_kernels.results", "version": 9}', "version"),
    "json-no-rows": (
        "json",
        '{"format": "sorted_kernels.results", "version": 1, "metric": "x",'
        ' "higher_is_better": true}',
        "'rows'",
    ),
    "json-rows-wrong": (
        "json",
        '{"format": "sorted_kernels.results", "version": 1, "metric": "x",'
        ' "higher_is_better": true, "rows": [3]}',
        "damaged",
    ),
    "csv-empty": ("csv", "", "header"),
    "csv-foreign": ("csv", "a,b\n1,2\n", "header"),
    "csv-no-rows": ("csv", GOOD_CSV, "one metric"),
    "csv-short-line": ("csv", GOOD_CSV + "1,acc,True\n", "line 2"),
    "csv-not-a-number": ("csv", GOOD_CSV + "1,acc,True,much,1,1,\n", "much"),
    "csv-size-below-1": ("csv", GOOD_CSV + "0,acc,True,0.5,1,1,\n", "'depth' is 0"),
    "csv-two-metrics": ("csv", GOOD_CSV + "1,a,True,1,1,1,\n2,b,True,1,1,1,\n", "one metric"),
}


@pytest.mark.parametrize(("kind", "text", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named_with_what_is_wrong(tmp_path, kind, text, says):
    path = tmp_path / f"bad.{kind}"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=says) as caught:
        getattr(Results, f"from_{kind}")(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_truncated_files_are_refused_or_whole(results, tmp_path, kind):
    path = tmp_path / "r"
    getattr(results, f"to_{kind}")(path)
    text = path.read_text()
    cut_inside_a_row = text.rstrip().rfind("," if kind == "csv" else "}")
    path.write_text(text[:cut_inside_a_row])
    with pytest.raises(CheckpointError):
        getattr(Results, f"from_{kind}")(path)


def test_binary_and_missing_files(tmp_path):
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "b", tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match="results file"):
            Results.from_json(path)


def test_a_failed_write_leaves_the_old_file(results, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left") as caught:
        results.to_json(path)
    assert str(path) in str(caught.value)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_unwritable_path(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        results.to_csv(tmp_path / "file" / "r.csv")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_flops": 200}, (1, 2)),
        ({"max_flops": 399.5}, (1, 2)),
        ({"max_flops": 400}, (2, 2)),
        ({"max_params": 300}, (1, 1)),
        ({"max_latency_ms": 2.0}, (2, 1)),
        ({"min_metric": 0.7}, (1, 2)),
        ({"min_metric": 0.5}, (1, 1)),
        ({"min_recovery": 85}, (1, 2)),
        ({"min_recovery": 100}, (2, 2)),
        ({"min_metric": 0.6, "max_latency_ms": 2.0}, (2, 1)),
        ({"min_metric": 0.5, "max_flops": 1000}, (2, 2)),
    ],
    ids=str,
)
def test_select(results, options, expected):
    assert tuple(select(results, **options).submodel.values()) == expected


def test_select_of_equals_is_the_cheapest():
    results = Results([row(2, 2, 0.9, 400), row(1, 2, 0.9, 200), row(1, 1, 0.1, 100)])
    assert select(results, max_flops=1000).flops == 200


def test_select_by_loss_takes_min_metric_as_the_worst_allowed():
    results = Results(ROWS, metric="loss", higher_is_better=False)
    assert select(results, min_metric=0.75).flops == 100
    assert select(results, max_flops=1000).metric == 0.5


def test_select_says_the_nearest_where_nothing_qualifies(results):
    with pytest.raises(OptionError, match=r"flops <= 90.*nearest is depth=1, width=1.*flops 100"):
        select(results, max_flops=90)
    with pytest.raises(OptionError, match=r"accuracy >= 0.95.*depth=2, width=2.*accuracy 0.9"):
        select(results, min_metric=0.95)
    with pytest.raises(OptionError, match=r"flops <= 100 and recovery in percent >= 99"):
        select(results, max_flops=100, min_recovery=99)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no condition.*max_flops"),
        ({"max_flops": 0}, "max_flops is 0"),
        ({"max_params": -1}, "max_params is -1"),
        ({"max_latency_ms": math.nan}, "max_latency_ms is nan"),
        ({"min_metric": math.nan}, "min_metric is nan"),
        ({"min_recovery": 101}, "min_recovery is 101"),
        ({"min_recovery": 0}, "min_recovery is 0"),
    ],
    ids=str,
)
def test_select_refuses_bad_conditions(results, options, says):
    with pytest.raises(OptionError, match=says):
        select(results, **options)


def test_select_by_a_latency_that_was_not_measured():
    with pytest.raises(OptionError, match="latency=True"):
        select(Results([row(1, 1, 0.5, 1)]), max_latency_ms=3)


def test_sizes_by_block_are_written_and_read(tmp_path):
    sizes = [(5, 9), (9, 5), 6]
    rows = [Row(Submodel(depth=2, ffn=ffn), 0.5, 10, 20) for ffn in sizes]
    results = Results(rows, metric="accuracy", higher_is_better=True)
    assert [row.submodel.ffn for row in results] == [6, (5, 9), (9, 5)]
    results.to_csv(tmp_path / "r.csv")
    results.to_json(tmp_path / "r.json")
    for again in (Results.from_csv(tmp_path / "r.csv"), Results.from_json(tmp_path / "r.json")):
        assert again.rows == results.rows
