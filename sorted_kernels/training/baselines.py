"""Ways to train one network at several widths, on the same footing: data, optimizer, counting."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sorted_kernels.optim import SGD
from sorted_kernels.submodel import Submodel, SubmodelSpace
from sorted_kernels.training.loop import fit
from sorted_kernels.training.objectives import (
    Objective,
    Sandwich,
    Stochastic,
    StochasticSummation,
    Summation,
)
from sorted_kernels.training.schedules import cosine

SANDWICH = 4
"""Sub-models a step of the sandwich rule: US' and LCS' own number."""


def _slimmable(widths: Sequence[int], seed: int) -> Objective:
    return Summation(SubmodelSpace(width=widths), reduction="sum")


def _universal(widths: Sequence[int], seed: int) -> Objective:
    return Sandwich(_between(widths), n=SANDWICH, seed=seed)


def _from_labels(widths: Sequence[int], seed: int) -> Objective:
    return Sandwich(_between(widths), n=SANDWICH, distill=False, seed=seed)


def _between(widths: Sequence[int]) -> SubmodelSpace:
    return SubmodelSpace(width=range(min(widths), max(widths) + 1))


def _stochastic(widths: Sequence[int], seed: int) -> Objective:
    return Stochastic(SubmodelSpace(width=widths), seed=seed)


def _summed(widths: Sequence[int], seed: int) -> Objective:
    return StochasticSummation(SubmodelSpace(width=widths), seed=seed)


@dataclass(frozen=True)
class Method:
    """A way to train a network at several widths.

    Attributes:
        title: What tables call it.
        objective: ``objective(widths, seed)`` makes its objective.
        passes: ``passes(number of widths)`` says how many forward/backward passes a micro-batch
            takes on average; those that were made are counted by :class:`Counted`.
        together: Whether one set of weights is trained for all widths, or one for each.
    """

    title: str
    objective: Callable[[Sequence[int], int], Objective]
    passes: Callable[[int], float]
    together: bool = True


METHODS = {
    "slimmable": Method("NS", _slimmable, float),
    "universal": Method("US", _universal, lambda count: SANDWICH),
    "lcs": Method("LCS-p", _from_labels, lambda count: SANDWICH),
    "sorted": Method("SortedNet", _stochastic, lambda count: 1),
    "sorted-sum": Method("SortedNet-sum", _summed, lambda count: (count + 1) / 2),
    "alone": Method("alone", _stochastic, lambda count: 1, together=False),
}
"""Slimmable networks (Yu et al., 2018): every width each step, largest first, losses summed;
universally slimmable ones (Yu and Huang, 2019): the sandwich rule over all widths between the
smallest and the largest, the others learning from the largest; LCS-p (Nunez et al., 2023): the
same from the labels alone; SortedNet's stochastic loss and stochastic summation; and the upper
bound, each width trained alone."""


class Counted:
    """An objective that counts its forward/backward passes, checkpoints included.

    Args:
        objective: The objective.

    Attributes:
        passes: Passes so far.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective, self.passes = objective, 0

    def __call__(self, model: nn.Module, batch: Any, scale: float = 1.0) -> Tensor:
        """As :meth:`Objective.__call__`."""
        loss = self.objective(model, batch, scale)
        self.passes += len(self.last_submodels)
        return loss

    @property
    def last_submodels(self) -> list[Submodel]:
        """The sub-models that the last call trained."""
        return self.objective.last_submodels

    def state_dict(self) -> dict[str, Any]:
        """The objective's state and the count."""
        return {"objective": self.objective.state_dict(), "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""
        self.objective.load_state_dict(state["objective"])
        self.passes = state["passes"]


@dataclass(frozen=True)
class Hyperparameters:
    """What all methods train with: SGD, cosine schedule (SortedNet v2, Table 7).

    Attributes:
        lr: Peak learning rate.
        momentum: Decay of the momentum.
        weight_decay: Added to the gradient.
        accumulate: Micro-batches an optimizer step.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    accumulate: int = 1


def train(
    model: nn.Module,
    objective: Objective,
    loader: Iterable[Any],
    steps: int,
    hyperparameters: Hyperparameters,
    *,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> int:
    """Train an elastic model by one method; the optimizer moves what each step has touched.

    Args:
        model: An elastic model, on the device to train on.
        objective: What a method made.
        loader: Batches.
        steps: Optimizer steps.
        hyperparameters: Of the optimizer.
        checkpoint_dir: Where an interrupted training is kept and taken up again.
        progress: Show progress.

    Returns:
        The forward/backward passes made.
    """
    counted = Counted(objective)
    optimizer = SGD(
        model.parameters(),
        lr=hyperparameters.lr,
        momentum=hyperparameters.momentum,
        weight_decay=hyperparameters.weight_decay,
    )
    fit(
        model,
        counted,
        loader,
        optimizer,
        steps=steps,
        accumulate=hyperparameters.accumulate,
        scheduler=cosine(optimizer, steps),
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=None if checkpoint_dir is None else max(1, steps // 10),
        keep=1,
        progress=progress,
    )
    return counted.passes
