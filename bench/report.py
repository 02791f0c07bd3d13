"""Write the README's measured section from the committed CSV files alone.

``python -m bench.report [--check] [--readme FILE] [--results FOLDER]``

RESULTS has one folder a device: ``cpu``, and one a GPU as ``run_gpu.sh`` wrote it. Rows of families
and contestants that are not known here get a table all the same. ``--check`` writes nothing; it
fails where the README, or a picture beside a CSV file, is not what the CSV files say.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.goals import EXPECTED, LIMIT, Goal, family_of, goals_for
from bench.plot import draw_all, source_of
from bench.rows import Row, read_rows, replace_file
from bench.table import NOISY_SPREAD, RATES, SECONDS, limit_share, limits_for
from bench.words import in_words, name_of, rows_of, sizes_of
from sorted_kernels.ops import promotion

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
STEPS, ALONE = (
    ("linear_step", "model_step", "resnet_step", "transformer_step", "conv_step"),
    (
        "linear",
        "conv2d",
        "depthwise",
        "layer_norm",
        "rms_norm",
        "batch_norm",
        "embedding",
        "adamw",
    ),  # fmt: skip
)
INTRODUCTION = """\
Medians of contestants that take turns in one process. B0 is naive PyTorch
(`F.linear(x, W[:m, :k])`), B1 views with in-place gradients by hand, B2 a stand-alone network of
the sub-model's size; B0 and B2 train with the fused `torch.optim.AdamW`. The limit is the least
time that the copy bandwidth and the matrix rate measured in the same run allow; above 100%, data
stayed in a cache. `~`: samples that differ widely.
"""
CAPTIONS = {
    "speedup.png": "A layer's step: times faster than naive PyTorch, against the active part",
    "limit_share.png": "Share of the measured limit, against the size of the work",
    "step_time.png": "Step time against a sub-model's cost, and the ideal line",
}


@dataclass(frozen=True)
class Problem:
    """What contestants were timed on.

    Attributes:
        kernel: Family.
        mode: Part of the work.
        sizes: As in the row.
        dtype: Element type.
        cache: ``hot`` or ``cold``.
        metric: Unit.
    """

    kernel: str
    mode: str
    sizes: str
    dtype: str
    cache: str
    metric: str

    @property
    def title(self) -> str:
        """The problem in words."""
        return f"{name_of(self.kernel, self.mode)} {in_words(self.sizes)}"


@dataclass(frozen=True)
class Results:
    """One device's folder: its name, rows, and the rows by problem and contestant."""

    folder: str
    rows: list[Row]

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return not self.folder.startswith("cpu")

    @functools.cached_property
    def problems(self) -> dict[Problem, dict[str, Row]]:
        """Contestants by problem; a later row replaces an earlier one."""
        found: dict[Problem, dict[str, Row]] = {}
        for row in self.rows:
            if row.kernel != "limit":
                key = (row.kernel, row.mode, row.sizes, row.dtype, row.cache, row.metric)
                found.setdefault(Problem(*key), {})[row.provider] = row
        return found

    def share(self, row: Row) -> float | None:
        """Share of the limit, where it is known."""
        if row.metric not in SECONDS:
            return None
        return limit_share(row, limits_for(row, self.rows))


def _quantity(row: Row | None) -> str:
    if row is None:
        return ""
    noisy = "~" if row.p80 > NOISY_SPREAD * row.p20 else ""
    value, unit = row.p50, row.metric
    if unit == "ms" and value < 0.1:
        value, unit = 1e3 * value, "us"
    digits = f"{value:.2f}" if unit == "ms" and value < 100 else f"{value:.3g}"
    return f"{noisy}{digits if value < 1000 else f'{value:.0f}'} {unit}"


def _ratio(times: Mapping[str, Row], over: str, under: str, form: str) -> str:
    if over not in times or under not in times or times[over].metric not in SECONDS:
        return ""
    return format(times[over].p50 / times[under].p50, form)


def _table(heading: str, results: Results, problems: Iterable[Problem]) -> list[str]:
    """A Markdown table, without the columns in which nothing stands."""
    chosen = {problem: results.problems[problem] for problem in problems}
    names = {name for times in chosen.values() for name in times}
    order = [name for name in ("B0", "B1", "B2") if name in names]
    order += [*sorted(names - {*order, "ours"}), *(["ours"] if "ours" in names else [])]
    several = {
        "dtype": len({problem.dtype for problem in chosen}) > 1,
        "cache": len({problem.cache for problem in chosen}) > 1,
    }
    lines = [[heading, *order, "ours / B2", "B0 / ours", "of the limit"]]
    for problem, times in chosen.items():
        extra = "".join(f", {getattr(problem, key)}" for key in several if several[key])
        share = results.share(times["ours"]) if "ours" in times else None
        lines.append(
            [
                problem.title + extra,
                *(_quantity(times.get(name)) for name in order),
                _ratio(times, "ours", "B2", ".2f"),
                _ratio(times, "B0", "ours", ".1f"),
                "" if share is None else f"{share:.0%}",
            ]
        )
    used = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    rows = ["| " + " | ".join(line[i] for i in used) + " |" for line in lines]
    return [rows[0], "|" + "---|" * len(used), *rows[1:], ""]


def _judge(results: Results) -> dict[tuple[str, Goal], list[tuple[Problem, float | None]]]:
    """Each goal's problems with the ratio reached, None where there was nothing to compare with."""
    found: dict[tuple[str, Goal], list[tuple[Problem, float | None]]] = {}
    for problem, times in results.problems.items():
        if "ours" not in times or problem.metric not in (*SECONDS, "MB"):
            continue
        sizes = sizes_of(problem.sizes)
        try:
            goals = goals_for(problem.kernel, problem.mode, sizes, problem.dtype, results.gpu)
        except KeyError:  # a family of the same name with other sizes
            continue
        for goal in goals:
            ratio = None
            if goal.baseline == LIMIT and (share := results.share(times["ours"])):
                ratio = 1 / share
            elif goal.baseline in times:
                ratio = times["ours"].p50 / times[goal.baseline].p50
            key = family_of(problem.kernel, results.gpu)
            family = EXPECTED[results.gpu][key] if key else problem.kernel
            name = f"{family}, {problem.mode}" if problem.kernel in ALONE else family
            found.setdefault((name, goal), []).append((problem, ratio))
    return found


def _goals(results: Results) -> list[str]:
    """Every goal: met, or where it is missed and by how much; then those without a measurement."""
    lines = ["| goal | met | missed |", "|---|---|---|"]
    judged = _judge(results)
    for (family, goal), outcomes in judged.items():
        known = [(problem, ratio) for problem, ratio in outcomes if ratio is not None]
        missed = sorted(
            ((ratio, problem) for problem, ratio in known if goal.verdict(ratio) != "met"),
            key=lambda pair: -pair[0],
        )
        words = [f"{_short(problem)} by {goal.gap(ratio)}" for ratio, problem in missed]
        if len(known) < len(outcomes):
            words.append(f"{len(outcomes) - len(known)} without {goal.baseline}")
        met = f"{len(known) - len(missed)} of {len(outcomes)}"
        lines.append(f"| {family}: {goal} | {met} | {'; '.join(words)} |")
    measured_ones = {family_of(problem.kernel, results.gpu) for problem in results.problems}
    for key, name in EXPECTED[results.gpu].items():
        if key not in measured_ones:
            lines.append(f"| {name} | not measured | |")
    return [*lines, ""]


def _short(problem: Problem) -> str:
    s = sizes_of(problem.sizes)
    if {"N", "m", "k"} <= set(s):
        words = f"{rows_of(s['N'])}, {s['m']}x{s['k']}"
        full = f" of {s['M']}x{s['K']}" if {"M", "K"} <= set(s) else ""
        return words + full + (", cold" if problem.cache == "cold" else "")
    return problem.sizes.replace("=", " ") + (", cold" if problem.cache == "cold" else "")


def _heading(results: Results) -> list[str]:
    """What was measured on, in which state of the sources, and the limits found."""

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(row, name)) for row in results.rows))

    limits = [
        f"{'copy' if row.mode == 'copy' else f'{row.dtype} matrix product'} "
        f"{row.p50:.3g} {row.metric}"
        for row in {
            (row.mode, row.dtype): row for row in results.rows if row.kernel == "limit"
        }.values()
        if row.mode in RATES
    ]
    commits = all_of("commit").replace("-dirty", " with local changes")
    return [
        f"### {all_of('device')}",
        "",
        f"{all_of('threads')} CPU threads, torch {all_of('torch')}, commit {commits}, "
        f"{all_of('date')}; limits: {', '.join(limits) or 'not measured'}. "
        f"From `bench/results/{results.folder}/benchmarks.csv`.",
        "",
    ]


def _section(results: Results, pictures: Iterable[str]) -> list[str]:
    """Everything about one device."""
    lines = _heading(results)
    kernels = list(dict.fromkeys(problem.kernel for problem in results.problems))
    alone = [kernel for kernel in ALONE if kernel in kernels]
    others = [kernel for kernel in kernels if kernel not in (*STEPS, *ALONE, "host")]
    groups = [("training step (forward, backward, AdamW)", STEPS)]
    groups += [(kernel.replace("_", " "), (kernel,)) for kernel in others]
    groups += [("host time of a call", ("host",))]
    for heading, family in groups:
        chosen = [problem for problem in results.problems if problem.kernel in family]
        if chosen:
            lines += _table(heading, results, chosen)
    if alone:
        chosen = [problem for problem in results.problems if problem.kernel in alone]
        lines += ["<details><summary>Each kernel alone</summary>", ""]
        lines += [*_table("kernel", results, chosen), "</details>", ""]
    for name in pictures:
        lines.append(f"![{CAPTIONS[name]}](bench/results/{results.folder}/{name})")
    return [*lines, "", *_goals(results)]


def never_run() -> list[str]:
    """Kernels whose present sources no recorded GPU run has passed.

    Sources are taken from the repository, so that the answer does not depend on what is built.
    """
    files = (machine.ROOT / "csrc").rglob("*.*")
    compiled = {
        path.relative_to(machine.ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }
    passed = promotion.recorded()
    return [
        kernel
        for kernel in promotion.SOURCES
        if kernel not in passed or passed[kernel] != promotion.digest_of(kernel, compiled)
    ]


def read_results(folder: Path) -> list[Results]:
    """The devices that have rows, the CPU first."""
    files = sorted(folder.glob("*/benchmarks.csv"), key=lambda p: (p.parent.name != "cpu", p))
    found = [Results(path.parent.name, read_rows([path])) for path in files]
    return [results for results in found if results.rows]


def measured(folder: Path) -> str:
    """The section between the README's markers."""
    lines = [INTRODUCTION]
    every = read_results(folder)
    for results in every:
        pictures = [name for name in CAPTIONS if (folder / results.folder / name).is_file()]
        lines += _section(results, pictures)
    if not any(results.gpu for results in every):
        lines += ["No figure is from a GPU.", ""]
    waiting = ", ".join(f"`{kernel}`" for kernel in never_run())
    lines.append(f"Kernels that no recorded GPU run has passed: {waiting or 'none'}.")
    return "\n".join(lines)


def stale_pictures(folder: Path) -> list[Path]:
    """Pictures that were not drawn from the CSV file beside them."""
    from PIL import Image  # comes with matplotlib

    return [
        path
        for csv in sorted(folder.glob("*/benchmarks.csv"))
        for path in (csv.parent / name for name in CAPTIONS)
        if path.is_file() and Image.open(path).info.get("Source") != source_of([csv])
    ]


def with_section(readme: str, section: str) -> str:
    """The README with the text between its markers replaced.

    Raises:
        ValueError: It does not have both markers once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.find(END) < readme.find(BEGIN):
        raise ValueError(f"the README needs {BEGIN} and {END}, once each and in order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Write, or check; 0 if the README is what the CSV files say."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--readme", type=Path, default=machine.ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    if not options.check:
        for csv in sorted(options.results.glob("*/benchmarks.csv")):
            for path in draw_all(csv.parent, [csv]):
                print(os.path.relpath(path))
    old = options.readme.read_text()
    new = with_section(old, measured(options.results))
    if not options.check:
        replace_file(options.readme, new)
        return 0
    stale = stale_pictures(options.results)
    for path in stale:
        print(f"{os.path.relpath(path)} was not drawn from the CSV file beside it")
    difference = list(
        difflib.unified_diff(
            old.splitlines(), new.splitlines(), str(options.readme), "the CSV files", lineterm=""
        )
    )
    print("\n".join(difference[:40]))
    if stale or difference:
        print("`python -m bench.report` writes what the CSV files say", file=sys.stderr)
    return 1 if stale or difference else 0


if __name__ == "__main__":
    sys.exit(main())
