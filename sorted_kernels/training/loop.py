"""The training loop."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sorted_kernels.errors import OptionError
from sorted_kernels.nn.activation import activate, current, dimensions
from sorted_kernels.optim import clip_grad_norm_
from sorted_kernels.training import random_state
from sorted_kernels.training.progress import Progress
from sorted_kernels.training.state import History, TrainingState

Evaluate = Callable[[nn.Module, int], Mapping[str, Any]]


def fit(
    model: nn.Module,
    objective: Callable[..., Tensor],
    loader: Iterable[Any],
    optimizer: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    scheduler: Any = None,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    resume: bool | str = "auto",
    progress: bool = True,
    device: torch.device | str | None = None,
) -> History:
    """Train an elastic model.

    An optimizer step takes ``accumulate`` micro-batches, always: a window that the end of an epoch
    cuts goes on in the next epoch, and micro-batches that remain when no full window is left are
    not run. Training resumed from a checkpoint goes on bit for bit as if it had never stopped:
    model, optimizer, schedule, sampler, order of the data and global random state are restored (the
    batches used in the epoch under way are read again and dropped).

    Ctrl-C waits for the step under way, saves it where there is a ``checkpoint_dir``, and raises
    KeyboardInterrupt. A second Ctrl-C does not wait, and an unfinished step is never saved.

    Args:
        model: The elastic model; put in training mode.
        objective: ``objective(model, batch, scale)`` runs forward and backward of a micro-batch and
            returns its loss, as those in :mod:`sorted_kernels.training` do.
        loader: Batches (tensors, or tuples, lists and mappings of them); iterated once an epoch.
        optimizer: A ``sorted_kernels.optim`` or ``torch.optim`` optimizer over the model.
        epochs: Stop after so many passes over the loader (which must have a length).
        steps: Stop after so many optimizer steps, counted from the very beginning.
        scheduler: A torch learning-rate scheduler, stepped once an optimizer step.
        accumulate: Micro-batches an optimizer step.
        max_grad_norm: Clip the gradient's norm to this before each optimizer step.
        evaluate: ``evaluate(model, step) -> dict``, called without gradients and in evaluation
            mode; the random state and the active sub-model are put back after it. It is called
            after the last step, and between as ``evaluate_every`` says.
        evaluate_every: Optimizer steps between two evaluations.
        checkpoint_dir: Where checkpoints lie. One is written after the last step, and between as
            ``checkpoint_every`` says.
        checkpoint_every: Optimizer steps between two checkpoints.
        keep: How many checkpoints to keep.
        resume: ``"auto"`` resumes if there is a checkpoint; True demands one; False demands that
            there is none.
        progress: Show progress on stderr.
        device: Where model and batches go; the model's own device by default.

    Returns:
        The history from the very first step on, resumed or not.

    Raises:
        OptionError: A number below 1, neither epochs nor steps, or too few batches for one step.
        CheckpointError: ``checkpoint_dir`` cannot be written, or what ``resume`` demands is not so.
        DimensionError: The objective's space does not fit the model.
    """
    _check_counts(
        epochs=epochs,
        steps=steps,
        accumulate=accumulate,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        keep=keep,
    )
    _check_choices(
        max_grad_norm, evaluate, evaluate_every, checkpoint_dir, checkpoint_every, resume
    )
    total = _total_steps(loader, epochs, steps, accumulate)
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    else:
        model.to(device)
    model.train()
    state = TrainingState(
        loader, model=model, optimizer=optimizer, scheduler=scheduler, objective=objective
    )
    if checkpoint_dir is not None:
        state.resume(checkpoint_dir, resume)
    optimizer.zero_grad()
    with Progress(total, state.step, progress) as display, _delayed_interrupt() as interrupted:
        try:
            while state.step < total:
                state.settled = False
                losses = [
                    objective(model, _to(state.cursor.take(), device), 1.0 / accumulate)
                    for _ in range(accumulate)
                ]
                if max_grad_norm is not None:
                    clip_grad_norm_(model.parameters(), max_grad_norm)
                lr = float(optimizer.param_groups[0]["lr"])
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
                state.advance(torch.stack(losses).mean())

                if display.due(state.step):
                    submodels = getattr(objective, "last_submodels", ())
                    display.show(state.step, state.history.losses[-1], lr, submodels)
                if evaluate is not None and _due(state.step, evaluate_every, total):
                    _record(state, evaluate, lr)
                if checkpoint_dir is not None and _due(state.step, checkpoint_every, total):
                    state.save(checkpoint_dir, keep)
                if interrupted():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if checkpoint_dir is not None and state.settled:
                state.save(checkpoint_dir, keep)
            raise
    return state.history


def _record(state: TrainingState, evaluate: Evaluate, lr: float) -> None:
    """Evaluate without a trace on the training, and add what came out to the history."""
    model, history = state.model, state.history
    before = random_state.snapshot()
    submodel = current(model) if dimensions(model) else None
    model.eval()
    try:
        with torch.no_grad():
            metrics = {name: _plain(value) for name, value in evaluate(model, state.step).items()}
    finally:
        model.train()
        if submodel is not None:
            activate(model, submodel)
        random_state.restore(before)
    try:
        json.dumps(metrics)
    except (TypeError, ValueError) as error:
        raise OptionError(f"evaluate returned {metrics!r}, which JSON cannot hold") from error
    since = history.records[-1]["step"] if history.records else 0
    recent = history.losses[since:]
    head = {"step": state.step, "epoch": state.cursor.epoch, "lr": lr}
    history.records.append({**head, "train_loss": sum(recent) / len(recent), **metrics})


def _plain(value: Any) -> Any:
    """A number of a one-element tensor or NumPy scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _due(step: int, every: int | None, total: int) -> bool:
    return step == total or (every is not None and step % every == 0)


def _to(batch: Any, device: torch.device | str) -> Any:
    """The batch with every tensor in it on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: _to(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_to(value, device) for value in batch]
    return batch


@contextmanager
def _delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C; yields a function that says whether there was one.

    Weights that a half-done optimizer step left could not be saved. Where Ctrl-C has a handler of
    the user's, or outside the main thread, nothing is changed.
    """
    seen = False

    def hold(signum: int, frame: Any) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _total_steps(
    loader: Iterable[Any], epochs: int | None, steps: int | None, accumulate: int
) -> int:
    """Optimizer steps in all, whichever of ``epochs`` and ``steps`` ends first."""
    if epochs is None:
        if steps is None:
            raise OptionError("neither epochs nor steps is given; give at least one")
        return steps
    try:
        batches = epochs * len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(
            f"epochs={epochs} needs a loader with a length, and {loader!r} has none; give steps"
        ) from None
    if batches < accumulate:
        raise OptionError(
            f"{epochs} epochs have {batches} batches, too few for accumulate={accumulate}"
        )
    most = batches // accumulate
    return most if steps is None else min(most, steps)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise OptionError(f"{name} is {value!r}; allowed are integers of at least 1")
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}; allowed are integers of at least 1")


def _check_choices(
    max_grad_norm: float | None,
    evaluate: Evaluate | None,
    evaluate_every: int | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    checkpoint_every: int | None,
    resume: bool | str,
) -> None:
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise OptionError(f"max_grad_norm is {max_grad_norm!r}; allowed are numbers above 0")
    if evaluate_every is not None and evaluate is None:
        raise OptionError(f"evaluate_every={evaluate_every} is given without evaluate")
    if checkpoint_every is not None and checkpoint_dir is None:
        raise OptionError(f"checkpoint_every={checkpoint_every} is given without checkpoint_dir")
    if not isinstance(resume, bool) and resume != "auto":
        raise OptionError(f"resume is {resume!r}; allowed are 'auto', True and False")
    if resume is True and checkpoint_dir is None:
        raise OptionError("resume=True is given without checkpoint_dir")
