"""Sorting heads and neurons by importance, so that prefixes are useful before any training.

Importance is the first-order one of Michel et al. (2019, arXiv:1905.10650), section 4.1, which
DynaBERT (Hou et al., 2020, arXiv:2004.04037, section 2.1) rewires pre-trained models by: how much
the loss would change if a head or neuron were masked, ``|d loss / d mask|``, summed over batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sorted_kernels import nn
from sorted_kernels.errors import DimensionError, OptionError, RuleError
from sorted_kernels.nn.activation import active, dimensions, plan_of
from sorted_kernels.nn.axis import AttributeAxis, ElasticAxis
from sorted_kernels.submodel import Submodel


@dataclass
class _Use:
    """An axis of a layer that holds a block's heads or neurons."""

    path: str
    layer: Any
    side: str  # "in" or "out"
    axis: ElasticAxis


def sort_by_importance(
    model: torch.nn.Module,
    loader: Iterable[Any],
    *,
    loss: Callable[[torch.nn.Module, Any], Tensor] | None = None,
    order: Sequence[str] = ("heads", "ffn"),
) -> None:
    """Reorder heads and feed-forward neurons within each block, the most important first.

    What the model computes at full size stays the same; its sub-models keep the most important
    part. Key-value heads move with the query heads that use them, and query heads are sorted within
    their group. In place, once, before training: states of optimizers are not reordered. Gradients
    are neither read nor written.

    Args:
        model: An elastic model, such as ``sk.elasticize(hf_model)``.
        loader: A few batches of data.
        loss: From model and batch, the loss; when not given, batches are mappings with labels, and
            ``model(**batch).loss`` is taken.
        order: Which dimensions to sort.

    Raises:
        DimensionError: The model has no such dimension, or its axes do not lie in blocks.
        RuleError: A dimension has an axis of a layer that is not linear, or blocks share a weight.
        OptionError: No batch, a batch without a loss, or an importance that is not finite. The
            model is then unchanged.
    """
    blocks = [uses for name in order for uses in _uses_by_block(model, name)]
    _check_sharing(blocks)
    scores = _scores(model, loader, loss or _loss_of_outputs, blocks)
    changes: list[tuple[Tensor, Tensor]] = []
    for uses, score in zip(blocks, scores, strict=True):
        for use in uses:
            changes += _reordered(use, _order_of_axis(use.axis, _unit(uses), score))
    with torch.no_grad():
        for param, value in changes:
            param.copy_(value)


def _uses_by_block(model: torch.nn.Module, dimension: str) -> list[list[_Use]]:
    """The layers that hold a dimension, one list for each block."""
    plan = plan_of(model)
    if dimension not in plan.axes:
        raise DimensionError(
            f"dimension {dimension!r} is unknown here; there are {list(plan.full)}"
        )
    places = dict(zip(map(id, plan.axes[dimension]), plan.places(dimension), strict=True))
    blocks: dict[Any, list[_Use]] = {}
    for path, module in model.named_modules():
        axes = module.__dict__.get("axes")
        for side, axis in axes.items() if isinstance(axes, dict) else ():
            if axis.dimension != dimension or isinstance(axis, AttributeAxis):
                continue
            if not isinstance(module, (nn.Linear, nn.Conv1D)):
                raise RuleError(f"{path}, a {type(module).__name__}, holds {dimension!r}: no order")
            if places[id(axis)] is None:
                raise DimensionError(f"{path} holds {dimension!r} outside the blocks of a list")
            blocks.setdefault(places[id(axis)], []).append(_Use(path, module, side, axis))
    return list(blocks.values())


def _unit(uses: list[_Use]) -> int:
    """Features of the smallest thing that moves: of a head, or one."""
    return min(use.axis.multiple_of for use in uses)


def _check_sharing(blocks: list[list[_Use]]) -> None:
    seen: dict[tuple[int, str], str] = {}
    for uses in blocks:
        for use in uses:
            other = seen.setdefault((id(use.layer.weight), use.side), use.path)
            if other != use.path:
                raise RuleError(f"{use.path} and {other} share a weight: one order for both")


def _scores(
    model: torch.nn.Module,
    loader: Iterable[Any],
    loss: Callable[[torch.nn.Module, Any], Tensor],
    blocks: list[list[_Use]],
) -> list[Tensor]:
    """The importance of every unit of each block: of a query head, or of a neuron."""
    masks, totals = [], []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_in_evaluation(model))
        stack.enter_context(active(model, Submodel(**dimensions(model))))
        stack.enter_context(torch.enable_grad())
        for uses in blocks:
            consumers = [use for use in uses if use.side == "in"]
            unit = _unit(uses)
            like: Tensor = uses[0].layer.weight
            mask = torch.ones(max(use.axis.full for use in uses) // unit, dtype=torch.float32,
                              device=like.device, requires_grad=True)  # fmt: skip
            for use in consumers:
                hook = use.layer.register_forward_pre_hook(_masking(mask, unit))
                stack.callback(hook.remove)
            masks.append(mask)
            totals.append(torch.zeros_like(mask, requires_grad=False))
        count = 0
        for count, batch in enumerate(loader, start=1):  # noqa: B007
            # Gradients of the masks alone: those of parameters are not wanted, and do not land.
            gradients = torch.autograd.grad(loss(model, batch), masks)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient.abs()
    if not count:
        raise OptionError("loader gave no batch; importance needs at least one")
    if not all(bool(total.isfinite().all()) for total in totals):
        raise OptionError("an importance is not finite; the loss or its gradient is not, either")
    return totals


def _masking(mask: Tensor, unit: int) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def scale(_layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = args
        wide = mask.repeat_interleave(unit) if unit > 1 else mask
        return (x * wide.to(x.dtype), *others)

    return scale


@contextlib.contextmanager
def _in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _loss_of_outputs(model: torch.nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise OptionError(
            f"a batch is a {type(batch).__name__}; without loss=, batches are mappings with labels"
        )
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise OptionError(
            f"{type(model).__name__} gave no loss for a batch of {list(batch)}: add labels"
        )
    return found


def _order_of_axis(axis: ElasticAxis, unit: int, score: Tensor) -> Tensor:
    """Indices that sort an axis: whole groups by their sum, the units in a group by themselves."""
    groups, inner = axis.full // axis.multiple_of, axis.multiple_of // unit
    by_group = score.view(groups, -1)
    places = torch.arange(axis.full, device=score.device).view(groups, inner, unit)
    if inner > 1:
        within = by_group.argsort(dim=1, descending=True, stable=True)
        places = torch.take_along_dim(places, within[:, :, None], 1)
    return places[by_group.sum(1).argsort(descending=True, stable=True)].flatten()


def _reordered(use: _Use, order: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A layer's parameters and what they become."""
    layer, packed = use.layer, isinstance(use.layer, nn.Conv1D)
    weight, bias = layer.weight, layer.bias
    if use.side == "in":
        return [(weight, weight.detach().index_select(0 if packed else 1, order))]
    if packed:
        both = [param for param in (weight, bias) if param is not None]
        return [
            (param, param.detach().unflatten(-1, (layer.parts, -1))[..., order].flatten(-2))
            for param in both
        ]
    return [(param, param.detach()[order]) for param in (weight, bias) if param is not None]
