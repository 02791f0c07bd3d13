"""scikit-learn's handwritten digits: 1,797 real scans of 8 x 8 pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sorted_kernels.data.augment import CropAndFlip
from sorted_kernels.data.batches import Batches
from sorted_kernels.data.images import Images
from sorted_kernels.errors import OptionError, require

_SIDE = 8


@dataclass(frozen=True)
class Digits:
    """The digits, split into training and test rows, standardised.

    Attributes:
        train_inputs: ``(n, 64)`` float32 of mean 0 and standard deviation 1 over all their pixels.
        train_targets: ``(n,)`` int64, digits 0 to 9.
        test_inputs: ``(m, 64)`` float32, standardised with the training rows' mean and deviation.
        test_targets: ``(m,)`` int64.
        background: The value that an empty pixel has after standardisation.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    background: float

    def train_loader(self, batch_size: int, *, augment: bool = True, seed: int = 0) -> Batches:
        """Shuffled training batches.

        Args:
            batch_size: Rows a batch.
            augment: Turn, move and scale each image a little, anew every time it is read.
            seed: Seed of the order and of the augmentation.
        """
        transform = self._jitter if augment else None
        return Batches(
            self.train_inputs, self.train_targets, batch_size, seed=seed, transform=transform
        )

    def test_loader(self, batch_size: int = 512) -> Batches:
        """The test rows, in order and unchanged."""
        return Batches(self.test_inputs, self.test_targets, batch_size, shuffle=False)

    def _jitter(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return jitter_images(inputs, generator, self.background)


def jitter_images(inputs: Tensor, generator: torch.Generator, background: float) -> Tensor:
    """Turn, move and scale each 8 x 8 image a little; ``(n, 64) -> (n, 64)``.

    Up to 15 degrees, 0.7 pixels along each axis and 10 percent, drawn uniformly.

    Args:
        inputs: Images, row by row.
        generator: Source of the draws.
        background: Value of what comes in at the edges.
    """
    rows = len(inputs)
    draws = (2.0 * torch.rand(4, rows, generator=generator) - 1.0).to(inputs)
    angle, zoom = draws[0] * math.radians(15.0), 1.0 / (1.0 + 0.1 * draws[1])
    across, down = draws[2:] * (0.7 * 2.0 / _SIDE)  # the grid's coordinates span 2
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    maps = torch.stack([cosine, -sine, across, sine, cosine, down], dim=1).view(rows, 2, 3)
    grid = F.affine_grid(maps, [rows, 1, _SIDE, _SIDE], align_corners=False)
    images = inputs.view(rows, 1, _SIDE, _SIDE) - background  # outside the image is zero
    return (F.grid_sample(images, grid, align_corners=False) + background).view(rows, -1)


def digits(test_fraction: float = 0.25, seed: int = 0) -> Digits:
    """Read the digits that come with scikit-learn and split them, each class in proportion.

    Args:
        test_fraction: Part of the rows that is for testing, between 0 and 1.
        seed: Seed of the split.

    Raises:
        OptionError: ``test_fraction`` is not between 0 and 1.
        DependencyError: scikit-learn is not installed.
    """
    if not 0.0 < test_fraction < 1.0:
        raise OptionError(f"test_fraction is {test_fraction!r}; allowed is between 0 and 1")
    datasets: Any = require("sklearn.datasets", "cli")
    selection: Any = require("sklearn.model_selection", "cli")
    pixels, labels = datasets.load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = selection.train_test_split(
        pixels, labels, test_size=test_fraction, random_state=seed, stratify=labels
    )
    mean, std = train_x.mean(), train_x.std()  # of the training rows alone

    def standardise(values: Any) -> Tensor:
        return torch.from_numpy((values - mean) / std).float()

    return Digits(
        standardise(train_x),
        torch.from_numpy(train_y).long(),
        standardise(test_x),
        torch.from_numpy(test_y).long(),
        float((0.0 - mean) / std),
    )


def digit_images(side: int = 8, test_fraction: float = 0.25, seed: int = 0) -> Images:
    """The digits as images of one channel, enlarged to what a convolutional network needs.

    Pixels are non-negative and an empty one is zero, up to the rounding of the standardised digits
    that they are taken from. For training, images move by up to an eighth of their side.

    Args:
        side: Height and width; a multiple of 8, reached by bilinear interpolation.
        test_fraction: As for :func:`digits`, which splits them.
        seed: Seed of the split.

    Raises:
        OptionError: ``side`` is no multiple of 8, or ``test_fraction`` is not between 0 and 1.
        DependencyError: scikit-learn is not installed.
    """
    if isinstance(side, bool) or not isinstance(side, int) or side < _SIDE or side % _SIDE:
        raise OptionError(f"side is {side!r}; allowed are multiples of {_SIDE}")
    data = digits(test_fraction, seed)

    def enlarge(rows: Tensor) -> Tensor:
        images = (rows - data.background).clamp(min=0).view(-1, 1, _SIDE, _SIDE)
        return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)

    train = enlarge(data.train_inputs)
    return Images(
        train,
        data.train_targets,
        enlarge(data.test_inputs),
        data.test_targets,
        mean=(train.mean().item(),),
        deviation=(train.std().item(),),
        augment=CropAndFlip(side // _SIDE, flip=False),
    )
