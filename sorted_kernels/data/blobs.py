"""The synthetic points of SortedNet's neuron-order experiment (v2, Figure 9 and Table 9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError, require

CENTERS = ((-2.0, 0.0), (0.0, 2.0), (2.0, 0.0), (0.0, -2.0))
DEVIATIONS = (0.5, 1.0, 0.5, 1.0)


def blobs(points: int = 1000, seed: int = 42) -> tuple[Tensor, Tensor]:
    """Points from four Gaussians in the plane, an equal number from each.

    The paper gives no split: for unseen points, draw again with another seed.

    Args:
        points: How many, at least 4.
        seed: Seed of the points and of their order.

    Returns:
        Inputs ``(points, 2)`` float32 and targets ``(points,)`` int64, 0 to 3.

    Raises:
        OptionError: ``points`` is below 4.
        DependencyError: scikit-learn is not installed.
    """
    if points < len(CENTERS):
        raise OptionError(f"points is {points}; allowed are integers of at least {len(CENTERS)}")
    datasets: Any = require("sklearn.datasets", "cli")
    inputs, targets = datasets.make_blobs(
        n_samples=points, centers=CENTERS, cluster_std=DEVIATIONS, random_state=seed
    )
    return torch.from_numpy(inputs).float(), torch.from_numpy(targets).long()
