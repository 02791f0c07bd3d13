"""Images in memory, split into training and test, with the loaders of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sorted_kernels.data.batches import Batches, Transform


@dataclass(frozen=True)
class Images:
    """A set of images, kept as they are stored; its loaders yield standardised float32.

    Attributes:
        train_inputs: ``(n, channels, height, width)``.
        train_targets: ``(n,)`` int64.
        test_inputs: ``(m, channels, height, width)``.
        test_targets: ``(m,)`` int64.
        mean: Mean of each channel of the training images.
        deviation: Standard deviation of each channel of the training images.
        augment: Changes a training batch at random, before it is standardised.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    augment: Transform

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.train_inputs.shape[1:])

    def train_loader(self, batch_size: int, *, augment: bool = True, seed: int = 0) -> Batches:
        """Shuffled training batches, without a last one that is not full.

        A batch norm cannot take a batch of one image, which the last could be.

        Args:
            batch_size: Images a batch.
            augment: Change each image at random, anew every time it is read.
            seed: Seed of the order and of the augmentation.
        """
        transform = self._augmented if augment else self._standardised
        return Batches(
            self.train_inputs, self.train_targets, batch_size, seed=seed, drop_last=True,
            transform=transform,
        )  # fmt: skip

    def test_loader(self, batch_size: int = 512) -> Batches:
        """The test images, in order and not augmented."""
        return Batches(
            self.test_inputs, self.test_targets, batch_size, shuffle=False,
            transform=self._standardised,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Images:
        """The same images on a device, where loaders then augment them."""
        return replace(
            self,
            train_inputs=self.train_inputs.to(device),
            train_targets=self.train_targets.to(device),
            test_inputs=self.test_inputs.to(device),
            test_targets=self.test_targets.to(device),
        )

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return self._standardised(self.augment(images, generator), generator)

    def _standardised(self, images: Tensor, _generator: torch.Generator) -> Tensor:
        values = images.float()
        mean, deviation = (
            values.new_tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.deviation)
        )
        return (values - mean) / deviation
