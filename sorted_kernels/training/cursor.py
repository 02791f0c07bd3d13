"""Where training stands in its data, and how to get back there after a restart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sorted_kernels.errors import CheckpointError, OptionError
from sorted_kernels.training import random_state


def generators_of(loader: Any) -> list[torch.Generator]:
    """The loader's own generators: its own, its sampler's and its batch sampler's."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = [loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    found: list[torch.Generator] = []
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
            found.append(generator)
    return found


class Cursor:
    """An endless stream of batches, epoch after epoch, that knows its position.

    At the start of an epoch the state of every generator that can have a say in the shuffling (the
    loader's own ones and the global ones) is kept. To resume, that state is put back, the epoch is
    started again, and the batches already used are read and dropped; so any loader whose order
    depends on those generators alone is replayed exactly, ``torch.utils.data.DataLoader`` with any
    number of (not persistent) workers among them.

    Args:
        loader: Iterable of batches that can be iterated once an epoch.

    Attributes:
        epoch: Epochs finished before the one under way.
        position: Batches taken from the epoch under way.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.epoch = 0
        self.position = 0
        self._iterator: Iterator[Any] | None = None
        self._start: dict[str, Any] | None = None

    def take(self) -> Any:
        """The next batch; begins the next epoch when the loader is exhausted.

        Raises:
            OptionError: The loader yields no batch at all.
        """
        if self._iterator is None:
            self._iterator = self._begin()
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self.position == 0:
                raise OptionError(f"loader {self.loader!r} yields no batch") from None
            self._iterator, self.epoch, self.position = None, self.epoch + 1, 0
            return self.take()
        self.position += 1
        return batch

    def _begin(self) -> Iterator[Any]:
        self._start = {
            "global": random_state.snapshot(),
            "loader": [generator.get_state() for generator in generators_of(self.loader)],
        }
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:  # DistributedSampler shuffles by epoch number
            set_epoch(self.epoch)
        return iter(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position, the generators at the epoch's start, and the loader's ones now."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "start": self._start,
            "now": [generator.get_state() for generator in generators_of(self.loader)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a recorded position. The global generators are left wherever the replay took them.

        Raises:
            CheckpointError: The loader has other generators than the recorded one, or ends early.
        """
        own = generators_of(self.loader)
        if len(own) != len(state["now"]):
            raise CheckpointError(
                f"the loader has {len(own)} generators of its own, the checkpoint's had "
                f"{len(state['now'])}; resume with the loader that training began with"
            )
        self.epoch, self.position, self._iterator = state["epoch"], 0, None
        if state["start"] is None:
            return
        random_state.restore(state["start"]["global"])
        for generator, saved in zip(own, state["start"]["loader"], strict=True):
            generator.set_state(saved)
        self._iterator = self._begin()
        for _ in range(state["position"]):
            try:
                next(self._iterator)
            except StopIteration:
                raise CheckpointError(
                    f"the loader ends after {self.position} batches, the checkpoint was taken "
                    f"after {state['position']}; resume with the loader that training began with"
                ) from None
            self.position += 1
        for generator, saved in zip(own, state["now"], strict=True):
            generator.set_state(saved)
