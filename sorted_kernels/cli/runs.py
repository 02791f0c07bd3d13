"""Runs on disk: training into a folder, and reading the folder back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sorted_kernels import optim, training
from sorted_kernels.cli.recipe import OBJECTIVES, Recipe
from sorted_kernels.cli.tasks import Task, load_task
from sorted_kernels.errors import CheckpointError, DeviceError, OptionError
from sorted_kernels.inference import Results, cost_plot, evaluate, heat_map
from sorted_kernels.inference.files import replacing
from sorted_kernels.inference.results import Row

Say = Callable[[str], None]
CONFIG, CHECKPOINTS, RESULTS = "config.json", "checkpoints", "results.json"


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is the GPU where torch sees one.

    Raises:
        DeviceError: It is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise DeviceError(f"--device is {name!r}; allowed are auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device is 'cuda', and torch sees no GPU here; allowed are auto, cpu")
    return torch.device(name)


def train_run(
    out: Path,
    recipe: Recipe,
    *,
    device: torch.device,
    resume: bool | str = "auto",
    progress: bool = True,
) -> Task:
    """Train a task into a folder: ``config.json``, ``checkpoints/`` and ``history.json``.

    Args:
        out: The folder.
        recipe: What to train and how.
        device: Where to train.
        resume: As for ``fit``.
        progress: Show progress.

    Raises:
        OptionError: The task cannot be trained so.
        CheckpointError: The folder cannot be written or holds another run.
    """
    task = load_task(recipe)
    recipe.write(out / CONFIG)
    model = task.model.to(device)
    optimizer = optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = _steps(task, recipe)
    with threads(task.threads):
        history = training.fit(
            model,
            _objective(task, recipe),
            task.train_loader,
            optimizer,
            steps=steps,
            scheduler=training.cosine(optimizer, steps, warmup=int(recipe.warmup * steps)),
            accumulate=recipe.accumulate,
            max_grad_norm=recipe.clip,
            checkpoint_dir=out / CHECKPOINTS,
            checkpoint_every=max(1, steps // 4),
            resume=resume,
            progress=progress,
        )
    with replacing(out / "history.json") as temporary:
        temporary.write_text(json.dumps({"losses": history.losses}), encoding="utf-8")
    return task


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many CPU threads for a while; torch's own choice where there is no count."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _steps(task: Task, recipe: Recipe) -> int:
    if recipe.steps is not None:
        return recipe.steps
    batches = recipe.epochs * len(task.train_loader)  # type: ignore[arg-type]
    if batches < recipe.accumulate:
        raise OptionError(
            f"--accumulate is {recipe.accumulate}; allowed are at most the {batches} batches of "
            f"{recipe.epochs} epochs"
        )
    return batches // recipe.accumulate


def _objective(task: Task, recipe: Recipe) -> training.Objective:
    options = {} if recipe.objective == "summation" else {"seed": recipe.seed}
    return OBJECTIVES[recipe.objective](task.space, loss=task.loss, **options)


def open_run(out: Path, device: torch.device) -> Task:
    """The task of a run with its trained weights.

    Raises:
        CheckpointError: The folder is no run, or its checkpoint cannot be read.
    """
    task = load_task(Recipe.read(out / CONFIG))
    latest = training.latest_checkpoint(out / CHECKPOINTS)
    if latest is None:
        raise CheckpointError(
            f"{str(out / CHECKPOINTS)!r} holds no checkpoint; `sorted-kernels train --out {out}` "
            "goes on with the training"
        )
    training.load_checkpoint(latest, model=task.model.to(device))
    return task


def evaluate_run(task: Task, out: Path, *, latency: bool = False, progress: bool = True) -> Results:
    """Evaluate the whole space; writes ``results.csv`` and ``results.json``."""
    with threads(task.threads):
        results = evaluate(
            task.model,
            task.space,
            task.test_loader,
            metric=task.metric,
            latency=latency,
            progress=progress,
            input_shape=(1, *task.example.shape[1:]),
        )
    results.to_csv(out / "results.csv")
    results.to_json(out / RESULTS)
    return results


def read_results(out: Path) -> Results:
    """What :func:`evaluate_run` wrote.

    Raises:
        CheckpointError: It is not there, or damaged.
    """
    if not (out / RESULTS).is_file():
        raise CheckpointError(
            f"{str(out)!r} has no {RESULTS}; `sorted-kernels evaluate {out}` makes it"
        )
    return Results.from_json(out / RESULTS)


def draw(results: Results, out: Path, chosen: Row | None = None) -> list[Path]:
    """Draw ``heat_map.png`` and ``cost.png``; returns their paths."""
    paths = [out / "heat_map.png", out / "cost.png"]
    heat_map(results, paths[0])
    cost_plot(results, paths[1], select=chosen)
    return paths
