"""The main job: 96 networks trained at once on handwritten digits, judged, chosen, exported."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sorted_kernels.cli import exporting, runs
from sorted_kernels.inference import Results, select
from sorted_kernels.inference.results import Row
from sorted_kernels.submodel import Submodel

OPTIONS = {
    "task": "digits",
    "objective": "stochastic",
    "epochs": 100,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "accumulate": 1,
    "width": 256,
    "hidden": 256,
    "batch_size": 64,
    "seed": 0,
}
"""The recipe; ``train`` has the same defaults."""

KEEP = 99.0
"""Percent of the best accuracy that the chosen sub-model keeps."""


def run_demo(out: Path, *, seed: int, epochs: int, progress: bool, console: Any) -> Row:
    """Train, evaluate, draw, select, export and prove; returns the chosen row.

    Args:
        out: Folder for everything that comes out.
        seed: Seed of the split, the weights, the sub-models and the order of the data.
        epochs: Passes over the training digits.
        progress: Show progress.
        console: rich's console.
    """
    say = console.print
    options = {**OPTIONS, "seed": seed, "epochs": epochs}
    say("[bold]1. Train[/] 96 sub-models (12 depths x 8 widths) at once, by the stochastic loss")
    begin = time.perf_counter()
    task = runs.train_run(out, options, resume="auto", progress=progress)
    say(f"   trained in {time.perf_counter() - begin:.0f} s")

    say("[bold]2. Evaluate[/] all of them on the test digits")
    results = runs.evaluate_run(task, out, progress=progress)
    _summary(results, task.space.largest, say)

    say(f"[bold]3. Select[/] the cheapest that keeps {KEEP:g}% of the best accuracy")
    chosen = select(results, min_recovery=KEEP)
    largest = results[task.space.largest]
    say(
        f"   {chosen.submodel}: {100 * chosen.metric:.2f}%, {chosen.flops:,} FLOPs "
        f"({100 * chosen.flops / largest.flops:.1f}% of the largest), "
        f"{chosen.parameters:,} parameters"
    )
    pictures = runs.draw(results, out, chosen)

    say("[bold]4. Export[/] it, and compare in a process that imports torch alone")
    program = out / "selected.pt2"
    exporting.write_program(task.model, chosen.submodel, task.example, program)
    difference = exporting.largest_difference(program, *runs.submodel_outputs(task, chosen))
    verdict = "the same" if difference <= 1e-5 else "NOT the same"
    say(f"   largest difference {difference:.1e}: {verdict}")
    for path in (*pictures, out / "results.csv", program):
        say(f"   {path}")
    if difference > 1e-5:
        raise RuntimeError(f"the export differs from the sub-model by {difference}")
    return chosen


def _summary(results: Results, largest: Submodel, say: Any) -> None:
    best = results.best.metric
    half = [
        row
        for row in results
        if all(2 * row.submodel[name] >= size for name, size in largest.items())
    ]
    worst = min(half, key=lambda row: row.metric)
    say(f"   largest: {100 * results[largest].metric:.2f}%; best: {100 * best:.2f}%")
    say(
        f"   worst of at least half the depth and width: {100 * worst.metric:.2f}% "
        f"({worst.submodel}), {100 * worst.metric / best:.1f}% of the best"
    )
