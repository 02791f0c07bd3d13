"""Tasks of the command line: a model, its space, and the data to train and judge it on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sorted_kernels.cli.recipe import DIGITS_WIDTHS, Recipe
from sorted_kernels.data import digits
from sorted_kernels.data.digits import Digits
from sorted_kernels.errors import OptionError, require
from sorted_kernels.models import RESIDUAL_MLP_RULES, ResidualMLP, elasticize
from sorted_kernels.nn import active
from sorted_kernels.submodel import SubmodelSpace


@dataclass(frozen=True)
class Task:
    """What a task's function returns.

    Attributes:
        model: An elastic model.
        space: The sub-models to train and evaluate.
        train_loader: Batches ``(inputs, targets)``; it has a length.
        test_loader: Batches ``(inputs, targets)`` that training never sees.
        example: One batch of inputs, for counting and exporting.
        loss: ``loss(outputs, targets) -> scalar``.
        metric: ``"accuracy"``, ``"loss"``, or a function, as for ``sk.inference.evaluate``.
        threads: CPU threads to train and evaluate with, in place of torch's own choice.
    """

    model: nn.Module
    space: SubmodelSpace
    train_loader: Iterable[Any]
    test_loader: Iterable[Any]
    example: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metric: Any = "accuracy"
    threads: int | None = None


def load_task(recipe: Recipe) -> Task:
    """The task that a recipe names.

    A file's function is called without arguments, after torch's generator was seeded.

    Raises:
        OptionError: No such task, file or function; or the function failed, or returned something
            that cannot be trained.
    """
    torch.manual_seed(recipe.seed)
    if recipe.task == "digits":
        return _digits_task(recipe)
    path, separator, name = recipe.task.rpartition(":")
    if not separator or not Path(path).is_file():
        raise OptionError(
            f"--task is {recipe.task!r}; allowed are 'digits' and path/to/file.py:function"
        )
    function = _function(Path(path), name)
    try:
        task = function()
    except Exception as error:
        raise OptionError(f"{recipe.task} failed: {error!r}") from error
    _check(task, recipe.task)
    return task


def resolve(spec: str) -> str:
    """The name of a task, with a file's path made absolute."""
    path, separator, name = spec.rpartition(":")
    return f"{Path(path).resolve()}:{name}" if separator and Path(path).is_file() else spec


def _digits_task(recipe: Recipe) -> Task:
    """Handwritten digits, and a plain residual MLP made elastic in depth and width."""
    data = digits()  # one split for all seeds, so that no seed's choices see another's test digits
    if recipe.holdout:
        data = _hold_out(data)
    model = ResidualMLP(64, recipe.width, recipe.hidden, recipe.depth, classes=10)
    elasticize(model, RESIDUAL_MLP_RULES, dimensions={"width": DIGITS_WIDTHS})
    return Task(
        model,
        SubmodelSpace(depth=range(1, recipe.depth + 1), width=range(1, DIGITS_WIDTHS + 1)),
        data.train_loader(recipe.batch_size, seed=recipe.seed),
        data.test_loader(),
        data.test_inputs[:4],
        # Layers this small gain little from a second thread, and lose much where the machine is
        # busy: threads that wait for each other spin.
        threads=1,
    )


def _hold_out(data: Digits) -> Digits:
    """The training digits alone, a fifth of them (each class in proportion) in the test's place."""
    selection: Any = require("sklearn.model_selection", "cli")
    train, judge = selection.train_test_split(
        range(len(data.train_targets)), test_size=0.2, random_state=0, stratify=data.train_targets
    )
    return replace(
        data,
        train_inputs=data.train_inputs[train],
        train_targets=data.train_targets[train],
        test_inputs=data.train_inputs[judge],
        test_targets=data.train_targets[judge],
    )


def _function(path: Path, name: str) -> Callable[[], Any]:
    """A function of a file, which is run as a module with its folder on the path."""
    module_name = f"_sorted_kernels_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"--task: {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise OptionError(f"--task: {str(path)!r} cannot be loaded: {error!r}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"--task: {str(path)!r} has no function {name!r}")
    return function


def _check(task: Any, spec: str) -> None:
    """Refuse what training, counting or exporting would stumble over later."""
    if not isinstance(task, Task):
        raise OptionError(
            f"{spec} returned a {type(task).__name__}; allowed is a sorted_kernels.cli.tasks.Task"
        )
    for name, kind in (("model", nn.Module), ("space", SubmodelSpace), ("example", Tensor)):
        value = getattr(task, name)
        if not isinstance(value, kind):
            raise OptionError(
                f"{spec} returned a task whose {name} is a {type(value).__name__}; "
                f"allowed is a {kind.__name__}"
            )
    if task.example.ndim < 1 or len(task.example) < 1:
        raise OptionError(
            f"{spec}: example has shape {tuple(task.example.shape)}; allowed is a batch"
        )
    if not hasattr(task.train_loader, "__len__"):
        raise OptionError(f"{spec}: train_loader has no length")
    task.model.eval()
    for submodel in (task.space.smallest, task.space.largest):
        try:
            with active(task.model, submodel), torch.no_grad():
                task.model(task.example)
        except Exception as error:
            raise OptionError(f"{spec}: the model fails at {submodel}: {error}") from error
