"""The benchmarks' CSV files, and the lines that a person reads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.harness import Case, Goal
from bench.rows import COLUMNS, append_rows, format_sizes, parse_sizes, read_rows, replace_file
from bench.table import describe, limit_share
from support.bench_rows import COMMITTED, ROW


def case(*goals, device="cpu"):
    return Case("kernel", "mode", "n=3", torch.float32, {}, torch.device(device), goals=goals)


def rows_of(**medians):
    return [replace(ROW, provider=name, p20=p50, p50=p50, p80=p50) for name, p50 in medians.items()]


def test_sizes_are_words_and_back():
    sizes = {"N": 32, "M": 2048, "m": 1}
    assert format_sizes(**sizes) == "N=32 M=2048 m=1"
    assert parse_sizes("N=32 M=2048 m=1") == sizes and list(parse_sizes("b=1 a=2")) == ["b", "a"]
    assert ROW.size("M") == 2048


def test_rows_come_back_as_they_went(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.csv"
    first = [ROW, replace(ROW, provider="B0", p50=1e-9, samples=7)]
    append_rows(path, first)
    append_rows(path, iter([replace(ROW, provider="B1", p80=123456.0)]))
    assert read_rows([path]) == [*first, replace(ROW, provider="B1", p80=123456.0)]
    assert path.read_text().count(",".join(COLUMNS)) == 1
    assert read_rows([path, path]) == read_rows([path]) * 2
    assert [file.name for file in path.parent.iterdir()] == ["rows.csv"]


def test_times_keep_six_digits(tmp_path):
    path = tmp_path / "rows.csv"
    append_rows(path, [replace(ROW, p50=1234.56789, p20=1.23456789e-5)])
    (row,) = read_rows([path])
    assert (row.p50, row.p20) == (1234.57, 1.23457e-5)


def test_no_rows_make_a_header_alone(tmp_path):
    append_rows(tmp_path / "rows.csv", [])
    assert (tmp_path / "rows.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert read_rows([tmp_path / "rows.csv"]) == []


@pytest.mark.parametrize(
    "text", ["kernel,p50\nlinear,3\n", "", "\n"], ids=["other", "empty", "blank"]
)
def test_a_file_of_other_columns_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="rows.csv has the columns"):
        append_rows(path, [ROW])
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    append_rows(path, [ROW])
    before = path.read_text()

    def fail(self, target):
        assert self.parent == path.parent, "a rename needs one file system"
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        append_rows(path, [ROW])
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_is_never_seen_half_written(tmp_path, monkeypatch):
    path, seen, write_text = tmp_path / "file", [], Path.write_text
    path.write_text("old")

    def watch(self, text):
        write_text(self, text[:1])
        seen.append(path.read_text())
        write_text(self, text)

    monkeypatch.setattr(Path, "write_text", watch)
    replace_file(path, "new")
    assert seen == ["old"] and path.read_text() == "new"


def test_committed_results_are_complete():
    """Every problem has all its contestants, measured on one machine at one commit."""
    rows = read_rows([COMMITTED])
    assert len({(row.device, row.threads, row.torch, row.commit) for row in rows}) == 1
    problems = {}
    for row in rows:
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.samples >= (1 if row.metric == "MB" else 7)
        problems.setdefault((row.kernel, row.mode, row.sizes, row.cache), []).append(row.provider)
    for problem, providers in problems.items():
        assert len(set(providers)) == len(providers), problem
        assert problem[0] == "limit" or "ours" in providers, problem
    steps = [set(who) for problem, who in problems.items() if problem[0] == "linear_step"]
    assert len(steps) == 8 and all(who == {"B0", "B1", "B2", "ours"} for who in steps)


def test_share_of_the_limit():
    row = replace(ROW, p50=2.0, flops=4_000_000_000, bytes=1_000_000)  # ms
    assert limit_share(row, {"copy": 1.0, "matmul": 4.0}) == pytest.approx(0.5)  # 1 ms each
    assert limit_share(row, {"copy": 0.5, "matmul": 4.0}) == pytest.approx(1.0)  # the larger floor
    assert limit_share(row, {"matmul": 4.0}) == pytest.approx(0.5)
    assert limit_share(replace(row, metric="us"), {"matmul": 4.0}) == pytest.approx(500)
    assert limit_share(row, {}) is None
    assert limit_share(replace(row, flops=0, bytes=0), {"copy": 1.0, "matmul": 4.0}) is None


def test_ratios_are_those_of_medians():
    rows = rows_of(B2=2.0, B1=1.0, B0=8.0, ours=0.5)
    assert describe(case(), rows, {}) == [
        "kernel mode n=3 float32 hot  (ms, p50 [p20, p80], 193 samples)",
        "    B2 2 [2, 2]  B1 1 [1, 1]  B0 8 [8, 8]  ours 0.5 [0.5, 0.5]",
        "    ours/B2 0.25  ours/B1 0.50  ours/B0 0.06  B0/ours 16.0x",
    ]


def test_without_a_baseline_there_is_no_ratio():
    assert len(describe(case(Goal("B0", 0.5)), rows_of(ours=0.5), {})) == 2


@pytest.mark.parametrize(
    "ours, goal, line",
    [
        (1.1, Goal("B2", 1.1), "goal: at most 1.10x of B2: met"),
        (1.32, Goal("B2", 1.1), "goal: at most 1.10x of B2: MISSED by 20%"),
        (0.125, Goal("B2", 1 / 8), "goal: at least 8x faster than B2: met"),
        (0.25, Goal("B2", 1 / 8), "goal: at least 8x faster than B2: MISSED by 100%"),
    ],
    ids=["met", "missed", "speedup-met", "speedup-missed"],
)
def test_goals(ours, goal, line):
    assert describe(case(goal), rows_of(B2=1.0, ours=ours), {})[-1] == f"    {line}"


def test_the_share_of_the_limit_is_said_on_a_gpu_alone():
    rows = rows_of(B2=1.0, ours=1.0)
    limits = {"matmul": ROW.flops / 0.5e-3 / 1e12}
    assert "50% of the limit" in describe(case(device="cuda"), rows, limits)[-1]
    assert "limit" not in describe(case(), rows, limits)[-1]


@pytest.mark.parametrize(
    "p80, preemptions, warnings",
    [(1.4, 0.0, []), (1.6, 0.0, ["samples of ours differ"]), (1.0, 90.0, ["preempted 90 times"])],
    ids=["quiet", "spread", "preempted"],
)
def test_noise_is_said(p80, preemptions, warnings):
    rows = [*rows_of(B2=1.0), replace(ROW, p20=1.0, p50=1.0, p80=p80)]
    noisy = [line for line in describe(case(), rows, {}, preemptions) if "NOISY" in line]
    assert len(noisy) == len(warnings)
    assert all(warning in line for warning, line in zip(warnings, noisy, strict=True))
