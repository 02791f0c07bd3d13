"""What objectives need of models of ``transformers``: forward and loss of their tasks.

Sorted Fine-Tuning (Valipour et al., "Sorted LLaMA") is ``Summation`` over depths with a
:class:`CausalLM`; with ``Stochastic`` it trains one random exit a micro-batch::

    task = sk.training.CausalLM(model)
    objective = sk.training.Summation(space, forward=task.forward, loss=task.loss)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sorted_kernels.errors import OptionError
from sorted_kernels.nn import LinearCrossEntropy

IGNORED = -100
_CHUNK_BYTES = 64 << 20


class CausalLM:
    """Forward and loss of a causal language model; its logits never exist whole.

    The exits of a forward are rows under one shared head, whose gradient is written once.

    Args:
        model: A causal language model of ``transformers``.
        label_smoothing: As in ``torch.nn.functional.cross_entropy``.
        distill: Weight from 0 to 1 with which exits learn from the deepest exit of their forward
            (its detached probabilities) instead of the labels.

    Attributes:
        loss: ``loss(hidden, targets)``, the mean over targets that are not -100; with
            ``of_exits`` for the exits of one forward.

    Raises:
        OptionError: ``distill`` is out of range, or the model has no head.
    """

    def __init__(
        self, model: nn.Module, *, label_smoothing: float = 0.0, distill: float = 0.0
    ) -> None:
        if not 0 <= distill <= 1:
            raise OptionError(f"distill is {distill!r}; allowed are 0 to 1")
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise OptionError(f"{type(model).__name__} has no head (get_output_embeddings)")
        self.loss = HeadLoss(head, label_smoothing, distill)

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S - 1, k) under the head, and the tokens (B, S - 1) that follow.

        Args:
            model: The model.
            batch: A mapping with ``input_ids`` (B, S), maybe ``attention_mask`` and ``labels``
                (B, S; -100 is left out); or input_ids alone.
        """
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        labels = inputs.pop("labels", None)
        if labels is None:
            labels = inputs["input_ids"]
            mask = inputs.get("attention_mask")
            if mask is not None:
                labels = labels.masked_fill(mask == 0, IGNORED)
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore
        return hidden[:, :-1], labels[:, 1:]

    def metric(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For ``sk.inference.evaluate``: sum of the losses, and how many targets there are."""
        losses = self.loss.head_loss(hidden, targets, reduction="sum")
        return losses.double(), (targets != IGNORED).sum()


class HeadLoss:
    """Cross-entropy of hidden states under a shared head.

    Args:
        head: The linear head.
        label_smoothing: As in torch.
        distill: See :class:`CausalLM`.
    """

    def __init__(self, head: nn.Linear, label_smoothing: float, distill: float) -> None:
        self.head, self.distill = head, distill
        self.head_loss = LinearCrossEntropy(head, label_smoothing=label_smoothing)

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of hidden states (B, S, k)."""
        return self.head_loss(hidden, targets)

    def of_exits(
        self, hidden: Sequence[Tensor], targets: Tensor, weights: Sequence[float] | None = None
    ) -> Tensor:
        """Losses (E,) of E exits, each (B, S, k), shallow to deep, times their weights."""
        exits = torch.stack(tuple(hidden))
        if not self.distill:
            return self.head_loss(exits, targets, exit_weights=weights)
        *shallow, deepest = [1.0] * len(hidden) if weights is None else weights
        from_labels = [(1 - self.distill) * weight for weight in shallow]
        losses = self.head_loss(exits, targets, exit_weights=[*from_labels, deepest])
        teacher = hidden[-1].detach()
        soft = [
            self.distill * weight * soft_head_loss(self.head, exit, teacher, targets)
            for weight, exit in zip(shallow, hidden, strict=False)
        ]
        return losses + torch.stack([*soft, torch.zeros_like(losses[-1])])


def soft_head_loss(head: nn.Linear, hidden: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of one exit against another's probabilities, both under one head.

    Logits exist a chunk of rows at a time, and are computed again in the backward.

    Args:
        head: The linear head.
        hidden: (..., k).
        teacher: (..., k), detached.
        targets: (...); rows whose target is -100 are left out.

    Returns:
        The mean over the rows that count.
    """
    counted = targets.reshape(-1) != IGNORED
    rows, soft = hidden.flatten(0, -2)[counted], teacher.flatten(0, -2)[counted]
    size = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))

    def chunk_loss(row: Tensor, soft_row: Tensor) -> Tensor:
        with torch.no_grad():
            target = head(soft_row).float().softmax(-1)
        return F.cross_entropy(head(row).float(), target, reduction="sum")

    total = rows.new_zeros((), dtype=torch.float32)
    for part, soft_part in zip(rows.split(size), soft.split(size), strict=True):
        total = total + checkpoint(chunk_loss, part, soft_part, use_reentrant=False)
    return total / counted.sum()


class SequenceClassification:
    """Forward and loss of a model that labels sequences, as in GLUE.

    Args:
        model: A sequence classifier of ``transformers``; with one label it is a regression.

    Attributes:
        loss: ``loss(logits, labels)``: cross-entropy, or the mean squared error of a regression.
    """

    def __init__(self, model: nn.Module) -> None:
        regression = model.config.num_labels == 1  # type: ignore[union-attr]
        self.loss = _squared_error if regression else F.cross_entropy

    @staticmethod
    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits (B, labels) and labels (B,) of a batch: a mapping with ``labels``, or a pair."""
        if isinstance(batch, Mapping):
            inputs = dict(batch)
            labels = inputs.pop("labels")
        else:
            inputs, labels = batch
        return SequenceClassification.logits(model, inputs), labels

    @staticmethod
    def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, labels); for ``sk.inference.evaluate``, as ``forward``."""
        return model(**inputs).logits


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits.squeeze(-1).float(), labels.float())
