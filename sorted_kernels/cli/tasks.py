"""Tasks of the command line: a model, its space, and the data to train and judge it on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sorted_kernels.data import digits
from sorted_kernels.errors import OptionError
from sorted_kernels.models import elastic_residual_mlp
from sorted_kernels.nn import dimensions
from sorted_kernels.submodel import SubmodelSpace

DEPTH, WIDTHS = 12, 8


@dataclass
class Task:
    """What a task function returns.

    Attributes:
        model: An elastic model.
        space: The sub-models to train and evaluate.
        train_loader: Batches ``(inputs, targets)``.
        test_loader: Batches ``(inputs, targets)`` that training never sees.
        example: One input of batch size 2 or more, for counting and exporting.
    """

    model: torch.nn.Module
    space: SubmodelSpace
    train_loader: Iterable[Any]
    test_loader: Iterable[Any]
    example: torch.Tensor


def digits_task(*, width: int, hidden: int, batch_size: int, seed: int) -> Task:
    """Handwritten digits, and a residual MLP of 12 depths and 8 widths."""
    torch.set_num_threads(1)  # a network this small is faster on one thread than on two
    data = digits(seed=seed)
    torch.manual_seed(seed)
    model = elastic_residual_mlp(64, width, hidden, DEPTH, 10, widths=WIDTHS)
    space = SubmodelSpace(depth=range(1, DEPTH + 1), width=range(1, WIDTHS + 1))
    return Task(
        model,
        space,
        data.train_loader(batch_size, seed=seed),
        data.test_loader(),
        data.test_inputs[:4],
    )


def load_task(spec: str, **options: int) -> Task:
    """The task that a name or ``path/to/file.py:function`` stands for.

    A file's function is called without arguments and returns a :class:`Task`.

    Raises:
        OptionError: No such task, file or function, or the function returned something else.
    """
    if spec == "digits":
        return digits_task(**options)
    path, separator, name = spec.rpartition(":")
    if not separator or not Path(path).is_file():
        raise OptionError(
            f"--task {spec!r} is unknown; allowed are 'digits' and path/to/file.py:function"
        )
    task = _function(Path(path), name)()
    if not isinstance(task, Task):
        raise OptionError(
            f"{spec} returned a {type(task).__name__}; it must return a sorted_kernels.cli.Task"
        )
    missing = set(task.space.dimensions) - set(dimensions(task.model))
    if missing:
        raise OptionError(f"{spec}: the space has dimensions {sorted(missing)}, the model has not")
    return task


def _function(path: Path, name: str) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"{path} has no function {name!r}")
    return function
