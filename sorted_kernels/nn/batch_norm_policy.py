"""Which statistics the batch norms of a model use: shared, or one set for each of some widths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from sorted_kernels.errors import OptionError, ShapeError
from sorted_kernels.nn.activation import activate, active, current
from sorted_kernels.nn.batch_norm import RECALIBRATED, STATISTICS, BatchNorm, BatchNormSet
from sorted_kernels.submodel import Submodel

POLICIES = ("shared", "switchable")


def batch_norms(model: torch.nn.Module) -> dict[str, BatchNorm]:
    """The elastic batch norms of a model by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, BatchNorm)}


def set_batch_norm_policy(
    model: torch.nn.Module, policy: str, submodels: Iterable[Submodel] | None = None
) -> None:
    """Choose whose statistics a model's batch norms use.

    ``"shared"``: the first channels of one set of running statistics and affine parameters, which
    all sub-models move; the state_dict is that of ``torch.nn``. ``"switchable"``: for each listed
    sub-model's channel count, a layer has a set of statistics and parameters of its own, which
    start as copies of the shared ones and train by themselves. The set in use is the one for the
    active channel count; another count is an error. The set for all channels is the layer's own.

    Call it before the optimizer is made: the sets' parameters are ordinary ones of the model.
    Statistics that :func:`sorted_kernels.inference.recalibrate` measured are dropped.

    Args:
        model: An elastic model with batch norms.
        policy: ``"shared"`` or ``"switchable"``.
        submodels: The sub-models (a space, or a list) that have sets; for ``"switchable"`` alone.

    Raises:
        OptionError: An unknown policy, a model without elastic batch norms, or ``submodels``
            missing, empty or not wanted.
        DimensionError: A sub-model does not fit the model.

    Source: Yu et al., Slimmable Neural Networks, 2018.
    """
    if policy not in POLICIES:
        raise OptionError(f"policy={policy!r}; allowed are {', '.join(POLICIES)}")
    layers = list(_some_batch_norms(model).values())
    listed = list(submodels or ())
    if bool(listed) != (policy == "switchable"):
        raise OptionError(
            f"policy={policy!r} with {len(listed)} submodels; 'switchable' needs at least one, "
            "'shared' takes none"
        )
    counts: list[set[int]] = [set() for _ in layers]
    if listed:
        with active(model, current(model)):
            for submodel in listed:
                activate(model, submodel)
                for found, layer in zip(counts, layers, strict=True):
                    found.add(layer.features_axis.active)
    for found, layer in zip(counts, layers, strict=True):
        layer.list_widths(found)


def recalibrated(model: torch.nn.Module) -> list[str]:
    """The sub-models that have recalibrated statistics: the counts of their smaller dimensions."""
    return sorted(
        {key for layer in batch_norms(model).values() for key in layer.sets(RECALIBRATED)}
    )


def forget_recalibrated(model: torch.nn.Module) -> None:
    """Drop the recalibrated statistics of all sub-models; the policy's are in force again."""
    for layer in batch_norms(model).values():
        layer.adopt({})


@contextlib.contextmanager
def calibrating(model: torch.nn.Module) -> Iterator[None]:
    """Have batch norms measure new statistics for the active sub-model; after an error, none.

    Forwards within the block normalise by their batches, the mean of whose statistics becomes the
    sub-model's. Nothing else changes.

    Raises:
        OptionError: The model has no elastic batch norm with running statistics.
    """
    tracking = [n for n in _some_batch_norms(model).values() if n.running_mean is not None]
    if not tracking:
        raise OptionError(f"{type(model).__name__}'s batch norms have no running statistics")
    before = [dict(layer.sets(RECALIBRATED)) for layer in tracking]
    kept = before
    try:
        for layer, sets in zip(tracking, before, strict=True):
            made = BatchNormSet(layer, layer.features_axis.active, STATISTICS)
            made.reset()
            layer.hold(RECALIBRATED, {**sets, layer.following.key: made})
            layer.calibrating = True
        yield
        kept = [
            {key: one for key, one in layer.sets(RECALIBRATED).items() if one.num_batches_tracked}
            for layer in tracking  # those that did not run have measured nothing
        ]
    finally:
        for layer, sets in zip(tracking, kept, strict=True):
            layer.calibrating = False
            layer.hold(RECALIBRATED, sets)


def describe_policy(model: torch.nn.Module) -> dict[str, list[int]]:
    """The channel counts that switchable batch norms have sets for, by path; empty if shared."""
    return {path: list(layer.listed) for path, layer in batch_norms(model).items() if layer.listed}


def is_recalibrated(name: str) -> bool:
    """Whether an entry of a state_dict belongs to recalibrated statistics."""
    return RECALIBRATED in name.split(".")


def recalibrated_in(model: torch.nn.Module, state: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The recalibrated sub-models, and their channels, that a state has for each batch norm.

    Raises:
        ShapeError: Entries that no batch norm of the model could have.
    """
    found, names = {}, set()
    for path, layer in batch_norms(model).items():
        prefix = f"{path}." if path else ""
        found[path] = layer.recalibrated_in(state, prefix)
        names |= {
            f"{prefix}{RECALIBRATED}.{key}.{name}" for key in found[path] for name in STATISTICS
        }
    odd = {name for name in state if is_recalibrated(name)} ^ names
    if odd:
        raise ShapeError(f"recalibrated statistics do not fit the model's: {sorted(odd)[:3]}")
    return found


def adopt_recalibrated(model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Have recalibrated statistics for the sub-models of a state, for their values to be loaded.

    Raises:
        ShapeError: As :func:`recalibrated_in`; nothing has changed then.
    """
    found = recalibrated_in(model, state)
    for path, layer in batch_norms(model).items():
        layer.adopt(found[path])


def _some_batch_norms(model: torch.nn.Module) -> dict[str, BatchNorm]:
    layers = batch_norms(model)
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no elastic batch norm; use sk.elasticize or "
            "sk.nn.BatchNorm2d"
        )
    return layers
