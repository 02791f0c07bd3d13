"""``compare``: SortedNet against the other ways to train one network at several widths."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from sorted_kernels.cli import comparison_report, runs
from sorted_kernels.cli.comparison import CONFIG, Comparison, Outcome, Run, Runner


def run_compare(
    comparison: Comparison,
    out: Path,
    *,
    data: Path | None,
    device: torch.device,
    progress: bool,
    console: Console,
) -> list[comparison_report.Column]:
    """Train and judge every run that is not done yet; print the tables and write them.

    What is finished is on disk at once, and the training under way is kept where Ctrl-C stops it:
    the same call goes on from there.

    Args:
        comparison: What to compare.
        out: Folder for everything that comes out.
        data: Where CIFAR-10 lies, if it is needed.
        device: Where to train.
        progress: Show the progress of each training.
        console: Where to print.

    Raises:
        OptionError: ``data`` is missing or not needed.
        DataError: It cannot be read.
        CheckpointError: The folder holds another comparison, or cannot be written.
    """
    images = comparison.load(data).to(device)
    comparison.write(out / CONFIG)
    runner = Runner(comparison, images, out, device=device, progress=progress)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    with runs.threads(comparison.threads):
        outcomes = _run_all(comparison, runner, say)
    found = comparison_report.columns(comparison, outcomes, runner.flops())
    # A file has no width that tables must fit into; rich would take 80 columns.
    wide = console if console.is_terminal else Console(file=console.file, width=160)
    for table in comparison_report.tables(found):
        wide.print(table)
    for path in comparison_report.write(found, out):
        say(str(path))
    return found


def _run_all(comparison: Comparison, runner: Runner, say: runs.Say) -> dict[str, Outcome]:
    """The outcome of each run, by its name."""
    wanted = comparison.runs()
    outcomes = {run.name: done for run in wanted if (done := runner.finished(run)) is not None}
    missing = [run for run in wanted if run.name not in outcomes]
    if outcomes:
        say(f"{len(outcomes)} of {len(wanted)} trainings were done before")
    begin, spent = time.perf_counter(), 0.0
    total = sum(map(comparison.passes_of, missing))
    for number, run in enumerate(missing, start=1):
        left = (time.perf_counter() - begin) * (total / spent - 1) if spent else None
        say(f"[bold]{number}/{len(missing)}[/] {_describe(run)}{_remaining(left)}")
        outcomes[run.name] = runner.run(run)
        spent += comparison.passes_of(run)
    return outcomes


def _describe(run: Run) -> str:
    return f"{run.method}, {run.norm} norm, seed {run.seed}, {run.steps:,} steps"


def _remaining(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"  [dim]about {seconds / 60:.0f} min left[/]"
