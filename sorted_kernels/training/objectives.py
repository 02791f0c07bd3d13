"""Objectives: which sub-models a micro-batch trains, and how their losses add up.

An objective is called with a model, a batch and a scale; it runs forward and backward of every
sub-model it chose, so that gradients accumulate in ``param.grad``, and returns the mean loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sorted_kernels.errors import CheckpointError, OptionError, SpaceError
from sorted_kernels.nn.activation import active
from sorted_kernels.submodel import Submodel, SubmodelSpace
from sorted_kernels.training.exits import chains, forward_exits

Loss = Callable[[Tensor, Tensor], Tensor]
Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
Reduction = Literal["mean", "sum"]


def forward_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Run the model on a batch that is a pair (inputs, targets); return (logits, targets)."""
    inputs, targets = batch
    return model(inputs), targets


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy against the teacher's probabilities, classes along dimension 1."""
    return F.cross_entropy(logits, teacher_logits.softmax(dim=1))


class Objective:
    """What the objectives share: the loss of one sub-model, forward and backward.

    Args:
        space: The sub-models to train.
        loss: ``loss(logits, targets) -> scalar``; cross entropy by default. If it has a method
            ``of_exits(outputs, targets, weights) -> (E,)``, that is called where E sub-models share
            a forward; it multiplies their losses by the weights, a list or None (as
            :class:`~sorted_kernels.training.CausalLM` has it).
        forward: ``forward(model, batch) -> (logits, targets)``; by default the batch is a pair.
        reduction: Whether the gradient is that of the sum or of the mean of the losses.
        share_depths: Whether sub-models of a micro-batch that differ in depth alone share one
            forward, each an exit of it. It takes a model whose forward loops once over its only
            depth list; with False each has a forward of its own.
        autocast: Dtype of ``torch.autocast`` around forward and loss (not backward), or None.

    Attributes:
        last_submodels: The sub-models that the last call trained, in order.

    Raises:
        SpaceError: ``space`` is not a :class:`SubmodelSpace`.
        OptionError: ``reduction`` is neither ``"mean"`` nor ``"sum"``.
    """

    def __init__(
        self,
        space: SubmodelSpace,
        *,
        loss: Loss = F.cross_entropy,
        forward: Forward = forward_pair,
        reduction: Reduction = "sum",
        share_depths: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not isinstance(space, SubmodelSpace):
            raise SpaceError(
                f"space is {space!r}; allowed is a SubmodelSpace with at least one sub-model "
                "(SubmodelSpace.of makes one from a list)"
            )
        if reduction not in ("mean", "sum"):
            raise OptionError(f"reduction is {reduction!r}; allowed are 'mean' and 'sum'")
        self.space, self.loss, self.forward, self.reduction = space, loss, forward, reduction
        self.share_depths, self.autocast = share_depths, autocast
        self.last_submodels: list[Submodel] = []

    def choose(self) -> list[Submodel]:
        """The sub-models that the next micro-batch trains, in order."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, batch: Any, scale: float = 1.0) -> Tensor:
        """Train one micro-batch: forward and backward of every chosen sub-model.

        Gradients add to what ``param.grad`` holds. The sub-model that was active before is active
        again afterwards.

        Args:
            model: An elastic model.
            batch: What ``forward`` takes; by default a pair (inputs, targets).
            scale: Factor on every gradient; one over the number of accumulated micro-batches.

        Returns:
            The mean of the losses, unscaled and detached.

        Raises:
            DimensionError: The model lacks a dimension of the space, or a size of it.
            OptionError: Sub-models were to share a forward (``share_depths``), which the model's
                forward does not allow.
        """
        self.last_submodels = chosen = self.choose()
        if self.reduction == "mean":
            scale = scale / len(chosen)
        together = chains(model, chosen) if self.share_depths else [[s] for s in chosen]
        return torch.cat([self._backward(model, c, batch, scale) for c in together]).mean()

    def _backward(
        self, model: nn.Module, chain: list[Submodel], batch: Any, scale: float
    ) -> Tensor:
        """Forward and backward of sub-models that share a forward; returns their losses."""
        with active(model, chain[-1]):  # a loss may read the model, where depth is no matter
            with self._precision(model):
                if len(chain) > 1:
                    pairs = forward_exits(model, chain, lambda: self.forward(model, batch))
                else:
                    pairs = [self.forward(model, batch)]
                weights = self._weights(chain)
                losses = self._losses(pairs, weights)
            (losses.sum() * scale).backward()
        losses = losses.detach()
        return losses if weights is None else losses / losses.new_tensor(weights)

    def _weights(self, submodels: list[Submodel]) -> list[float] | None:
        """What the losses of some sub-models are multiplied by, or None for ones."""
        return None

    def _losses(self, pairs: list[tuple[Tensor, Tensor]], weights: list[float] | None) -> Tensor:
        """A weighed loss for each exit of a forward; at once where the loss can (``of_exits``)."""
        at_once = getattr(self.loss, "of_exits", None)
        if at_once is not None and len(pairs) > 1:
            outputs, targets = zip(*pairs, strict=True)
            return at_once(outputs, targets[0], weights)
        losses = torch.stack([self.loss(*pair) for pair in pairs])
        return losses if weights is None else losses * losses.new_tensor(weights)

    def _precision(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        device = next(model.parameters()).device.type
        return torch.autocast(device, self.autocast)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the objective: here nothing, as nothing is drawn."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""


class _Sampling(Objective):
    """An objective that draws sub-models from its own generator.

    Args:
        space: The sub-models to train and their distribution.
        seed: Seed of the generator.
        **options: What :class:`Objective` takes.
    """

    def __init__(self, space: SubmodelSpace, *, seed: int = 0, **options: Any) -> None:
        super().__init__(space, **options)
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, so that the draws go on where they were."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned.

        Raises:
            CheckpointError: The state is not one of this class.
        """
        if set(state) != {"generator"}:
            raise CheckpointError(
                f"state of {type(self).__name__} has entries {sorted(state)}; "
                "allowed is 'generator'"
            )
        self.generator.set_state(state["generator"])


class Stochastic(_Sampling):
    """The stochastic loss: one drawn sub-model a micro-batch (SortedNet, section 3).

    Args:
        space: The sub-models to train and their distribution.
        seed: Seed of the draws.
        **options: What :class:`Objective` takes.
    """

    def choose(self) -> list[Submodel]:
        """One draw from the space."""
        return [self.space.sample(self.generator)]


class StochasticSummation(_Sampling):
    """Draw a sub-model; sum its loss and those of the smaller ones it contains (SortedNet).

    The smaller ones are the draw with one dimension replaced by each smaller size that the space
    has for it, one dimension at a time; with ``cross=True`` every combination of sizes at or below
    the draw's. Of a space that is a list, only members of the list count.

    Args:
        space: The sub-models to train and their distribution.
        cross: Train the full cross product at or below the draw.
        seed: Seed of the draws.
        **options: What :class:`Objective` takes. ``reduction`` is ``"sum"`` as in the paper;
            ``"mean"`` keeps the gradient's size the same however many sub-models the draw contains.
    """

    def __init__(
        self, space: SubmodelSpace, *, cross: bool = False, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(space, seed=seed, **options)
        self.cross = cross

    def choose(self) -> list[Submodel]:
        """The draw, then what it targets, largest first."""
        drawn = self.space.sample(self.generator)
        if self.cross:
            targets = [s for s in self.space if s != drawn and s.fits_in(drawn)]
        else:
            smaller = (
                drawn.replace(**{name: size})
                for name, sizes in self.space.dimensions.items()
                for size in sizes
                if size < drawn[name]
            )
            targets = [submodel for submodel in smaller if submodel in self.space]
        return [drawn, *sorted(targets, reverse=True)]


class Summation(Objective):
    """Every sub-model of the space on every micro-batch, largest first.

    A loss weighs as much as its sub-model is likely in the space, so that the gradient is what
    :class:`Stochastic` has on average: the mean where all are equally likely. With weights that
    rise with depth, as in LayerSkip, exits cost the full model less.

    Args:
        space: The sub-models to train; those whose weight is zero are left out.
        reduction: ``"mean"`` (as in Sorted Fine-Tuning) or ``"sum"`` (as in slimmable networks).
        **options: What :class:`Objective` takes.
    """

    def __init__(
        self, space: SubmodelSpace, *, reduction: Reduction = "mean", **options: Any
    ) -> None:
        super().__init__(space, reduction=reduction, **options)
        self._chances = {submodel: space.probability(submodel) for submodel in space}
        self._weighs = len({*self._chances.values()}) > 1

    def choose(self) -> list[Submodel]:
        """All of the space, largest first."""
        return sorted((s for s, chance in self._chances.items() if chance), reverse=True)

    def _weights(self, submodels: list[Submodel]) -> list[float] | None:
        if not self._weighs:
            return None
        return [len(self.last_submodels) * self._chances[submodel] for submodel in submodels]


class Sandwich(_Sampling):
    """The sandwich rule: the largest, the smallest and ``n - 2`` drawn sub-models, summed.

    As in universally slimmable networks (Yu and Huang, 2019): the largest learns from the labels,
    the others from its detached soft targets of the same micro-batch. Without distillation all
    learn from the labels, as in LCS. Draws are independent: one may repeat another.

    Args:
        space: The sub-models to train and their distribution; it must have at least two.
        n: How many sub-models a micro-batch trains, at least 2.
        distill: Whether the others learn from the largest one's output instead of the labels.
        soft_loss: ``soft_loss(logits, teacher_logits) -> scalar``, for what is distilled.
        seed: Seed of the draws.
        **options: What :class:`Objective` takes; ``loss`` is for what learns from labels.

    Raises:
        OptionError: ``n`` is below 2.
        SpaceError: The space has fewer than two sub-models.
    """

    def __init__(
        self,
        space: SubmodelSpace,
        *,
        n: int = 4,
        distill: bool = True,
        soft_loss: Loss = soft_cross_entropy,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(space, seed=seed, **options)
        if isinstance(n, bool) or not isinstance(n, int) or n < 2:
            raise OptionError(f"n is {n!r}; allowed are integers of at least 2")
        if len(space) < 2:
            raise SpaceError(f"space {space!r} has one sub-model; Sandwich needs at least 2")
        self.n, self.distill, self.soft_loss = n, distill, soft_loss

    def choose(self) -> list[Submodel]:
        """The largest, the smallest, then the draws."""
        drawn = [self.space.sample(self.generator) for _ in range(self.n - 2)]
        return [self.space.largest, self.space.smallest, *drawn]

    def __call__(self, model: nn.Module, batch: Any, scale: float = 1.0) -> Tensor:
        """Train one micro-batch; as :meth:`Objective.__call__`, with distillation if asked for."""
        if not self.distill:
            return super().__call__(model, batch, scale)
        self.last_submodels = self.choose()
        largest, *others = self.last_submodels
        with active(model, largest):
            with self._precision(model):
                teacher, targets = self.forward(model, batch)
                loss = self.loss(teacher, targets)
            (loss * scale).backward()
        losses, teacher = [loss.detach()], teacher.detach()
        for submodel in others:
            with active(model, submodel):
                with self._precision(model):
                    loss = self.soft_loss(self.forward(model, batch)[0], teacher)
                (loss * scale).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()
