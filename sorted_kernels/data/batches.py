"""A loader for data that fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError, ShapeError

Transform = Callable[[Any, torch.Generator], Any]


class Batches:
    """Batches of tensors in memory: no workers, no collation, its own generator.

    Args:
        inputs: ``(n, ...)``, or a mapping of such tensors.
        targets: ``(n, ...)``.
        batch_size: Rows a batch; the last batch of an epoch may have fewer.
        shuffle: Draw a new order every epoch.
        seed: Seed of the generator.
        drop_last: Leave out a last batch that is not full.
        transform: ``transform(batch_inputs, generator)``, applied to every batch's inputs.

    Attributes:
        generator: Source of the orders and of the transform's randomness.

    Raises:
        ShapeError: Inputs and targets differ in length, or there is no row.
        OptionError: ``batch_size`` below 1, or no full batch with ``drop_last``.
    """

    def __init__(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        targets: Tensor,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        transform: Transform | None = None,
    ) -> None:
        parts = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
        shapes = [tuple(part.shape) for part in parts]
        rows = targets.shape[0] if targets.ndim else 0
        if not rows or not shapes or any(shape[:1] != (rows,) for shape in shapes):
            shown = shapes[0] if isinstance(inputs, Tensor) else shapes
            raise ShapeError(
                f"inputs have shape {shown}, targets {tuple(targets.shape)}; allowed "
                "are equal lengths of at least 1"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise OptionError(f"batch_size is {batch_size!r}; allowed are integers of at least 1")
        if drop_last and batch_size > rows:
            raise OptionError(
                f"batch_size is {batch_size} and drop_last is set; allowed are at most the "
                f"{rows} rows there are"
            )
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        self.shuffle, self.drop_last, self.transform = shuffle, drop_last, transform
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        rows = len(self.targets)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        rows = len(self.targets)
        order = torch.randperm(rows, generator=self.generator) if self.shuffle else None
        for index in range(len(self)):
            window = slice(index * self.batch_size, (index + 1) * self.batch_size)
            picked = window if order is None else order[window].to(self.targets.device)
            inputs: Any
            if isinstance(self.inputs, Tensor):
                inputs = self.inputs[picked]
            else:
                inputs = {name: part[picked] for name, part in self.inputs.items()}
            if self.transform is not None:
                inputs = self.transform(inputs, self.generator)
            yield inputs, self.targets[picked]
