"""How a run trains: the options of ``train``, and what ``config.json`` holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sorted_kernels import training
from sorted_kernels.errors import CheckpointError, OptionError
from sorted_kernels.inference.files import replacing

OBJECTIVES: dict[str, Callable[..., training.Objective]] = {
    "stochastic": training.Stochastic,
    "stochastic-summation": training.StochasticSummation,
    "summation": training.Summation,
    "sandwich": training.Sandwich,
}
DIGITS_WIDTHS = 8
"""Widths of the digits' residual MLP."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what training gives; the defaults are the demo's.

    ``holdout`` is for choosing among recipes without looking at the test digits.

    Attributes:
        task: ``"digits"``, or ``path/to/file.py:function``.
        objective: A name among ``OBJECTIVES``.
        epochs: Passes over the training data.
        steps: Optimizer steps, in place of ``epochs``.
        batch_size: Digits: rows a batch.
        lr: Peak learning rate of AdamW; after a warm-up it falls along half a cosine.
        weight_decay: Decoupled decay.
        warmup: Part of all steps over which the learning rate rises.
        clip: The gradient's norm is clipped to this.
        accumulate: Micro-batches an optimizer step.
        depth: Digits: residual blocks.
        width: Digits: features of the residual stream.
        hidden: Digits: features inside a block.
        holdout: Digits: judge on a fifth of the training digits, not on the test digits.
        seed: Seed of everything random.

    Raises:
        OptionError: A value outside what is allowed.
    """

    task: str = "digits"
    objective: str = "stochastic"
    epochs: int = 100
    steps: int | None = None
    batch_size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    accumulate: int = 1
    depth: int = 12
    width: int = 256
    hidden: int = 256
    holdout: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            _refuse("objective", self.objective, ", ".join(OBJECTIVES))
        for name in ("epochs", "steps", "batch_size", "accumulate", "depth"):
            _at_least(name, getattr(self, name), 1)
        for name in ("width", "hidden"):
            _at_least(name, getattr(self, name), DIGITS_WIDTHS)
        _at_least("seed", self.seed, 0)
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                _refuse(name, getattr(self, name), "numbers above 0")
        if not 0 <= self.weight_decay < math.inf:
            _refuse("weight_decay", self.weight_decay, "numbers of at least 0")
        if not 0 <= self.warmup < 1:
            _refuse("warmup", self.warmup, "parts of at least 0 and below 1")
        if self.task != "digits":
            for name in ("batch_size", "depth", "width", "hidden", "holdout"):
                if getattr(self, name) != getattr(Recipe, name):
                    raise OptionError(
                        f"{_option(name)} is an option of the task 'digits'; the function of "
                        f"{self.task!r} decides it itself"
                    )

    def write(self, path: Path) -> None:
        """Write it as JSON, unless the file holds the same already.

        Raises:
            CheckpointError: The file cannot be written, or holds another recipe.
        """
        if path.is_file():
            there = asdict(Recipe.read(path))
            ours = asdict(self)
            other = [
                f"{_option(n)} {there[n]} there, {ours[n]} here"
                for n in ours
                if there[n] != ours[n]
            ]
            if other:
                raise CheckpointError(
                    f"{str(path.parent)!r} holds another run ({'; '.join(other)}); "
                    "choose another folder, or delete it"
                )
            return
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read what :meth:`write` wrote.

        Raises:
            CheckpointError: The file is missing or holds something else.
        """
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            missing = {field.name for field in fields(cls)} - set(content)
            if missing:
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            return cls(**content)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{str(path.parent)!r} is no run: it has no {path.name}; "
                "`sorted-kernels train --out` makes one"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{str(path)!r} is no run's configuration: {error}") from error


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse(name: str, value: object, allowed: str) -> None:
    raise OptionError(f"{_option(name)} is {value!r}; allowed are {allowed}")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        _refuse(name, value, f"integers of at least {least}")
