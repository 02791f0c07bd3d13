"""What a person sees while training runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from sorted_kernels.submodel import Submodel


class Progress:
    """Shows step, loss, learning rate, sub-model and steps a second.

    On a terminal with rich installed this is a bar; elsewhere a plain line now and then, on stderr.

    Args:
        total: Optimizer steps in all.
        done: Steps done before this run.
        enabled: Show nothing when false.
    """

    def __init__(self, total: int, done: int, enabled: bool = True) -> None:
        self._total, self._done, self._first = total, done, done
        self._enabled = enabled
        self._began = time.monotonic()
        self._next = self._began
        self._bar = _make_bar() if enabled and sys.stderr.isatty() else None
        self._interval = 0.25 if self._bar else 5.0

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(
                "train", total=self._total, completed=self._done, text=""
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def due(self, step: int) -> bool:
        """Whether :meth:`show` should be called now (reading a loss off a device is not free)."""
        return self._enabled and (step == self._total or time.monotonic() >= self._next)

    def show(self, step: int, loss: float, lr: float, submodels: Iterable[Submodel]) -> None:
        """Show where training stands."""
        now = time.monotonic()
        self._next = now + self._interval
        listed = list(submodels)
        names = str(listed[0]) if listed else ""
        if len(listed) > 1:
            names += f" and {len(listed) - 1} more"
        speed = (step - self._first) / max(now - self._began, 1e-9)
        text = f"loss {loss:.4f}  lr {lr:.2e}  {names}  {speed:.1f} steps/s"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)


def _make_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    return Bar(
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )
