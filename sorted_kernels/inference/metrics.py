"""Metrics of the GLUE tasks that are no mean over samples: they need all predictions at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError, ShapeError, require


@dataclass(frozen=True)
class WholeMetric:
    """A metric over all predictions and targets of a data set.

    Attributes:
        compute: ``compute(predictions, targets) -> float`` over NumPy vectors.
        classes: Whether outputs are logits ``(..., classes)``; otherwise values ``(...)`` or
            ``(..., 1)``.
    """

    compute: Callable[[Any, Any], float]
    classes: bool

    def pair(self, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions and targets of one batch, as vectors.

        Raises:
            OptionError: They are not tensors.
            ShapeError: Their shapes do not fit.
        """
        if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
            raise OptionError(
                f"output is a {type(output).__name__} and targets a {type(targets).__name__}; "
                "allowed are tensors: give forward= to pick the logits"
            )
        if self.classes:
            predicted = output.argmax(-1)
        else:
            predicted = output.squeeze(-1) if output.dim() > targets.dim() else output
        if predicted.shape != targets.shape:
            wanted = "(..., classes) with targets (...)" if self.classes else "of targets' shape"
            raise ShapeError(
                f"output has shape {tuple(output.shape)} and targets {tuple(targets.shape)}; "
                f"allowed are outputs {wanted}"
            )
        return predicted.reshape(-1), targets.reshape(-1)

    def of(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
        """The metric over all batches; NaN where there is none."""
        if not pairs:
            return math.nan
        predicted, targets = (torch.cat(column).cpu() for column in zip(*pairs, strict=True))
        if not self.classes:
            predicted, targets = predicted.double(), targets.double()
        return float(self.compute(predicted.numpy(), targets.numpy()))


def _sklearn(name: str) -> Callable[[Any, Any], float]:
    def compute(predicted: Any, targets: Any) -> float:
        metrics = require("sklearn.metrics", "cli")
        return getattr(metrics, name)(targets, predicted)

    return compute


def _scipy(name: str) -> Callable[[Any, Any], float]:
    def compute(predicted: Any, targets: Any) -> float:
        return getattr(require("scipy.stats", "cli"), name)(predicted, targets).statistic

    return compute


WHOLE_METRICS = {
    "f1": WholeMetric(_sklearn("f1_score"), classes=True),
    "matthews": WholeMetric(_sklearn("matthews_corrcoef"), classes=True),
    "pearson": WholeMetric(_scipy("pearsonr"), classes=False),
    "spearman": WholeMetric(_scipy("spearmanr"), classes=False),
}
