"""Everything that moves while a model is trained, to be saved and resumed as one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sorted_kernels.errors import CheckpointError
from sorted_kernels.training import random_state
from sorted_kernels.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    prepare_directory,
    save_checkpoint,
)
from sorted_kernels.training.cursor import Cursor


@dataclass
class History:
    """What training left behind; plain numbers, ready for JSON.

    Attributes:
        losses: The mean training loss of each optimizer step.
        records: One entry an evaluation: ``step``, ``epoch``, ``lr``, ``train_loss`` (mean since
            the entry before), and what ``evaluate`` returned.
    """

    losses: list[float] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)


class TrainingState:
    """Model, optimizer, schedule, objective, position in the data and history, at some step.

    Args:
        loader: The loader that training reads.
        **parts: ``model``, ``optimizer``, ``scheduler`` and ``objective``, as
            :func:`save_checkpoint` takes them.

    Attributes:
        step: Optimizer steps done.
        settled: Whether all of it stands at the end of a step, so that it may be saved.
    """

    def __init__(self, loader: Iterable[Any], **parts: Any) -> None:
        self.parts = parts
        self.model: nn.Module = parts["model"]
        self.cursor = Cursor(loader)
        self.step = 0
        self.settled = True
        self._history = History()
        self._unread: list[Tensor] = []  # losses still on their device: reading one waits for it
        self._saved_step = 0

    @property
    def history(self) -> History:
        """The history up to now; waits for the losses that a device still computes."""
        if self._unread:
            self._history.losses += torch.stack(self._unread).tolist()
            self._unread = []
        return self._history

    def advance(self, loss: Tensor) -> None:
        """Count an optimizer step and its loss."""
        self._unread.append(loss)
        self.step += 1
        self.settled = True

    def save(self, directory: str | os.PathLike[str], keep: int) -> None:
        """Write a checkpoint, unless the one of this step was written."""
        if self.step == self._saved_step:
            return
        extra = {
            "cursor": self.cursor.state_dict(),
            "losses": torch.tensor(self.history.losses, dtype=torch.float64),
            "records": self.history.records,
        }
        save_checkpoint(directory, self.step, extra=extra, keep=keep, **self.parts)
        self._saved_step = self.step

    def resume(self, directory: str | os.PathLike[str], demand: bool | str) -> None:
        """Go to the latest checkpoint of the directory, after seeing that it can be written.

        Args:
            directory: Where checkpoints lie.
            demand: True: there must be one. False: there must be none. ``"auto"``: either.

        Raises:
            CheckpointError: The demand is not met, or the checkpoint does not fit.
        """
        prepare_directory(directory)
        latest = latest_checkpoint(directory)
        if latest is None:
            if demand is True:
                raise CheckpointError(f"{str(directory)!r} has no checkpoint to resume from")
            return
        if demand is False:
            raise CheckpointError(
                f"{str(directory)!r} has {latest.name} and resume is False; "
                "resume, or name a directory without checkpoints"
            )
        checkpoint = load_checkpoint(latest, **self.parts)
        extra = checkpoint.extra
        if not {"cursor", "losses", "records"} <= extra.keys():
            raise CheckpointError(f"{latest} was not written by fit: its place in the data is lost")
        self.step = self._saved_step = checkpoint.step
        self._history = History(extra["losses"].tolist(), extra["records"])
        self.cursor.load_state_dict(extra["cursor"])
        random_state.restore(checkpoint.random_state)
