"""The main job: 96 networks trained at once on handwritten digits, judged, chosen, exported."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from sorted_kernels.cli import exporting, runs
from sorted_kernels.cli.recipe import Recipe
from sorted_kernels.cli.tasks import Task
from sorted_kernels.inference import Results, select
from sorted_kernels.inference.files import replacing
from sorted_kernels.inference.results import Row
from sorted_kernels.models import RESIDUAL_MLP_RULES
from sorted_kernels.training import latest_checkpoint

KEEP = 99.0
"""Percent of the best accuracy that the chosen sub-model keeps."""

WRITTEN = {
    "heat_map.png": "accuracy of every sub-model",
    "cost.png": "accuracy and cost, the Pareto front, the chosen one",
    "results.csv": "the same as a table",
    "selected.pt2": "the chosen sub-model: torch.export.load(...).module()",
    "check_selected.py": "the comparison of step 4",
}


@dataclass(frozen=True)
class Summary:
    """What the demo found; ``summary.json``. Accuracies are fractions.

    Attributes:
        largest: Accuracy of the largest sub-model.
        best: Accuracy of the best one.
        worst_half: Lowest accuracy with at least half the depth and half the width.
        worst_half_submodel: Its sizes.
        chosen: Sizes of the chosen sub-model.
        chosen_accuracy: Its accuracy.
        chosen_flops: Its FLOPs as a part of the largest one's.
        export_difference: Largest difference between its exported program and itself.
        training_seconds: Time of training in this call.
        seconds: Time of everything in this call.
    """

    largest: float
    best: float
    worst_half: float
    worst_half_submodel: dict[str, int]
    chosen: dict[str, int]
    chosen_accuracy: float
    chosen_flops: float
    export_difference: float
    training_seconds: float
    seconds: float


def run_demo(
    out: Path, recipe: Recipe, *, device: torch.device, progress: bool, console: Console
) -> Summary:
    """Train, evaluate, draw, select, export and prove.

    The sub-model is chosen on the digits it is then reported on, as in the paper: an honest choice
    for production would be judged on digits of its own.

    Args:
        out: Folder for everything that comes out.
        recipe: How to train.
        device: Where to train and evaluate.
        progress: Show progress.
        console: Where to print.

    Raises:
        RuntimeError: The exported program computes something else than the sub-model.
    """
    begin = time.perf_counter()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    _say_training(out, say)
    task = runs.train_run(out, recipe, device=device, progress=progress)
    trained = time.perf_counter() - begin
    say(f"   trained in {trained:.0f} s on {device}")

    say("[bold]2. Evaluate[/] all of them on digits that training never saw")
    results = runs.evaluate_run(task, out, progress=progress)
    _say_accuracies(results, task, say)

    say(f"[bold]3. Select[/] the cheapest that keeps {KEEP:g}% of the best accuracy")
    chosen, largest = select(results, min_recovery=KEEP), results[task.space.largest]
    _say_chosen(results, chosen, largest, say)
    runs.draw(results, out, chosen)

    say("[bold]4. Export[/] it, and compare in a process that imports torch alone")
    difference = _export(task, chosen, out)
    say(f"   largest difference {difference:.1e} over the test digits: the same")

    worst = _worst_half(results, task)
    summary = Summary(
        largest=largest.metric,
        best=results.best.metric,
        worst_half=worst.metric,
        worst_half_submodel=dict(worst.submodel),
        chosen=dict(chosen.submodel),
        chosen_accuracy=chosen.metric,
        chosen_flops=chosen.flops / largest.flops,
        export_difference=difference,
        training_seconds=trained,
        seconds=time.perf_counter() - begin,
    )
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    say(f"[bold]Done[/] in {summary.seconds:.0f} s. Written:")
    for name, what in WRITTEN.items():
        say(f"   {out / name}  [dim]{what}[/]")
    return summary


def _say_training(out: Path, say: runs.Say) -> None:
    say("[bold]1. Train[/] 96 sub-models (12 depths x 8 widths) at once, by the stochastic loss")
    say(f"   a plain PyTorch residual MLP, made elastic by {len(RESIDUAL_MLP_RULES)} rules:")
    for name, axes in RESIDUAL_MLP_RULES.items():
        say(f"     {name:14} " + ", ".join(f"{axis}: {dim}" for axis, dim in axes.items()))
    before = latest_checkpoint(out / runs.CHECKPOINTS)
    if before is not None:
        say(f"   going on from {before}; delete {out} to begin anew")


def _say_chosen(results: Results, chosen: Row, largest: Row, say: runs.Say) -> None:
    say(f"   {chosen.submodel}: accuracy {results.format_metric(chosen)}%")
    say(
        f"   {chosen.flops:,} FLOPs, {100 * chosen.flops / largest.flops:.1f}% of the largest; "
        f"{chosen.parameters:,} parameters of {largest.parameters:,}"
    )


def _say_accuracies(results: Results, task: Task, say: runs.Say) -> None:
    largest, best, worst = results[task.space.largest], results.best, _worst_half(results, task)
    say(
        f"   largest sub-model {results.format_metric(largest)}%; "
        f"best {results.format_metric(best)}% ({best.submodel})"
    )
    say(
        f"   worst with at least half the depth and half the width "
        f"{results.format_metric(worst)}% ({worst.submodel})"
    )
    say(f"   that is {100 * worst.metric / largest.metric:.1f}% of the largest")


def _worst_half(results: Results, task: Task) -> Row:
    full = task.space.largest
    half = [row for row in results if all(2 * row.submodel[n] >= full[n] for n in full)]
    return min(half, key=lambda row: row.metric)


def _export(task: Task, chosen: Row, out: Path) -> float:
    model = task.model.cpu()  # the program is compared on the CPU, wherever the model was trained
    exporting.write_program(model, chosen.submodel, task.example, out / "selected.pt2")
    inputs = torch.cat([inputs for inputs, _ in task.test_loader])
    return exporting.prove(model, chosen.submodel, inputs, out)
