"""Batch-norm statistics measured for one sub-model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sorted_kernels.errors import OptionError
from sorted_kernels.inference.evaluate import call_model, device_of, evaluating, move, pair
from sorted_kernels.nn import activate
from sorted_kernels.nn.batch_norm_policy import calibrating
from sorted_kernels.submodel import Submodel


def recalibrate(
    model: torch.nn.Module,
    submodel: Submodel,
    loader: Iterable[Any],
    *,
    batches: int | None = 10,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
) -> int:
    """Measure the batch-norm statistics of one sub-model, and keep them for it.

    They are the mean of its batches' statistics, each batch counted alike. From then on they are in
    force whenever the sub-model is active and in evaluation mode, and in its export; they are part
    of the state_dict. Other sub-models' statistics and the shared ones stay as they are, bit for
    bit, and so do the weights; nothing is copied but the statistics. Training moves the policy's
    statistics only: recalibrate again after it.

    Only batch norms are in training mode while they are measured (dropout is not); all modes and
    the active sub-model are restored, also after an error, when the earlier statistics stay.

    Args:
        model: An elastic model with batch norms.
        submodel: The sub-model.
        loader: Gives ``(inputs, targets)`` pairs; targets are not used.
        batches: How many to take at most; None: all.
        forward: Function of ``(model, inputs)``; ``model(inputs)`` otherwise.
        device: Where batches are moved to; the model's own device otherwise.

    Returns:
        How many batches there were.

    Raises:
        OptionError: No elastic batch norm, ``batches`` below 1, or an empty loader.
        DimensionError: The sub-model does not fit the model.
        ShapeError: A batch with one value a channel.

    Source: Yu and Huang, Universally Slimmable Networks, 2019.
    """
    if batches is not None and (isinstance(batches, bool) or batches < 1):
        raise OptionError(f"batches={batches!r}; allowed are integers of at least 1, or None")
    run, count = forward or call_model, 0
    target = torch.device(device) if device is not None else device_of(model)
    with evaluating(model):
        activate(model, submodel)
        with calibrating(model):
            for batch in itertools.islice(loader, batches):
                run(model, move(pair(batch)[0], target))
                count += 1
            if not count:
                raise OptionError("loader is empty; recalibrate needs at least one batch")
    return count
