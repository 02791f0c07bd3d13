"""Runs on disk: training into a folder, and reading the folder back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sorted_kernels import optim, training
from sorted_kernels.cli.tasks import Task, load_task
from sorted_kernels.errors import CheckpointError, OptionError
from sorted_kernels.inference import Results, cost_plot, evaluate, heat_map
from sorted_kernels.inference.results import Row

OBJECTIVES = {
    "stochastic": training.Stochastic,
    "stochastic-summation": training.StochasticSummation,
    "summation": training.Summation,
    "sandwich": training.Sandwich,
}
_DIGITS_OPTIONS = ("width", "hidden", "batch_size", "seed")


def train_run(out: Path, options: Mapping[str, Any], *, resume: bool | str, progress: bool) -> Task:
    """Train a task into a folder: ``config.json``, ``checkpoints/`` and ``history.json``.

    Args:
        out: The folder.
        options: ``task``, ``objective``, ``epochs``, ``lr``, ``weight_decay``, ``accumulate``, and
            for the digits ``width``, ``hidden``, ``batch_size``, ``seed``.
        resume: As for ``fit``.
        progress: Show progress.

    Raises:
        OptionError: A value outside what is allowed.
        CheckpointError: The folder cannot be written or holds another run.
    """
    if options["objective"] not in OBJECTIVES:
        raise OptionError(
            f"--objective {options['objective']!r} is unknown; allowed are {', '.join(OBJECTIVES)}"
        )
    for name in ("epochs", "batch_size", "accumulate", "width", "hidden"):
        if options[name] < 1:
            raise OptionError(f"--{name.replace('_', '-')} {options[name]} must be at least 1")
    _write_config(out, options)
    task = open_task(options)
    optimizer = optim.AdamW(
        task.model.parameters(), lr=options["lr"], weight_decay=options["weight_decay"]
    )
    batches = len(task.train_loader)  # type: ignore[arg-type]
    steps = options["epochs"] * batches // options["accumulate"]
    history = training.fit(
        task.model,
        OBJECTIVES[options["objective"]](task.space, seed=options["seed"]),
        task.train_loader,
        optimizer,
        epochs=options["epochs"],
        scheduler=training.cosine(optimizer, steps, warmup=min(40, steps // 10)),
        accumulate=options["accumulate"],
        max_grad_norm=1.0,
        checkpoint_dir=out / "checkpoints",
        checkpoint_every=max(1, steps // 4),
        resume=resume,
        progress=progress,
    )
    (out / "history.json").write_text(json.dumps({"losses": history.losses}))
    return task


def open_task(options: Mapping[str, Any]) -> Task:
    """The task that a run's options describe."""
    chosen = {name: options[name] for name in _DIGITS_OPTIONS}
    return load_task(options["task"], **chosen)


def _write_config(out: Path, options: Mapping[str, Any]) -> None:
    path = out / "config.json"
    if path.is_file() and json.loads(path.read_text()) != dict(options):
        raise CheckpointError(f"{path} is of a run with other options; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(options), indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from error


def open_run(out: Path) -> Task:
    """The task of a run with its trained weights.

    Raises:
        CheckpointError: The folder is no run, or its checkpoint cannot be read.
    """
    path = out / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{out} is no run: there is no {path.name}; `train` makes one")
    task = open_task(json.loads(path.read_text()))
    latest = training.latest_checkpoint(out / "checkpoints")
    if latest is None:
        raise CheckpointError(f"{out / 'checkpoints'} holds no checkpoint")
    training.load_checkpoint(latest, model=task.model)
    return task


def evaluate_run(task: Task, out: Path, *, progress: bool) -> Results:
    """Evaluate the whole space; writes ``results.csv`` and ``results.json``."""
    shape = tuple(task.example.shape)
    results = evaluate(
        task.model, task.space, task.test_loader, progress=progress, input_shape=(1, *shape[1:])
    )
    results.to_csv(out / "results.csv")
    results.to_json(out / "results.json")
    return results


def draw(results: Results, out: Path, chosen: Row | None = None) -> list[Path]:
    """Draw ``heat_map.png`` and ``cost.png``; returns their paths."""
    paths = [out / "heat_map.png", out / "cost.png"]
    heat_map(results, paths[0])
    cost_plot(results, paths[1], select=chosen)
    return paths


def submodel_outputs(task: Task, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the first test batch, and what the active sub-model makes of them."""
    from sorted_kernels.nn import active

    inputs = next(iter(task.test_loader))[0]
    task.model.eval()
    with active(task.model, row.submodel), torch.no_grad():
        return inputs, task.model(inputs)
