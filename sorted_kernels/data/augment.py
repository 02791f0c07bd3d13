"""Random changes of a batch of images, from a generator that the caller owns.

Every draw comes from that generator and none from anything else, so a loader that is put back to a
recorded state repeats its images exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError


@dataclass(frozen=True)
class CropAndFlip:
    """Shifts each image by up to ``padding`` pixels an axis, and mirrors some left to right.

    What comes in at the edges is zero: as if the image was padded and cut back to its size at a
    random place.

    Args:
        padding: Largest shift.
        flip: Whether half of the images, at random, are mirrored.

    Raises:
        OptionError: ``padding`` is below 0.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.padding, bool) or not isinstance(self.padding, int) or self.padding < 0:
            raise OptionError(f"padding is {self.padding!r}; allowed are integers of at least 0")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """``(n, channels, height, width)`` of any dtype -> the same shape and dtype."""
        count, _, height, width = images.shape
        span = 2 * self.padding + 1
        shifts = torch.randint(span, (2, count), generator=generator).to(images.device)
        mirrored = torch.rand(count, generator=generator).to(images.device) < 0.5
        padded = torch.nn.functional.pad(images, [self.padding] * 4)
        rows = shifts[0, :, None] + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device).expand(count, width)
        if self.flip:
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        columns = shifts[1, :, None] + columns
        picked = torch.arange(count, device=images.device)[:, None, None]
        # Advanced indices around a slice move to the front: (n, height, width, channels).
        moved = padded[picked, :, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()
