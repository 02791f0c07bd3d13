"""The loss of a language model's head, fused with the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError
from sorted_kernels.nn.layers import Linear, check_width
from sorted_kernels.ops.gradient import GradientSlot
from sorted_kernels.ops.linear_cross_entropy import run_linear_cross_entropy


class LinearCrossEntropy(torch.nn.Module):
    """Cross-entropy of hidden states under a linear head; see ``sk.linear_cross_entropy``.

    The head is read, and trained, up to its active sizes; its own forward and hooks do not run.

    Args:
        head: ``torch.nn.Linear`` or ``sk.nn.Linear`` without an activation. It stays the model's:
            parameters and state_dict of this module are empty.
        ignore_index: Targets that do not count.
        label_smoothing: As in torch.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        hidden (..., active in_features), or (E, ..., active in_features) for E exits, and target
        (...) -> a scalar, or (E,).

    Raises:
        OptionError: ``head`` is no linear layer, or has an activation.
        ShapeError: In the forward: hidden is not as wide as the head's active input.
    """

    def __init__(
        self,
        head: torch.nn.Linear,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(head, torch.nn.Linear):
            raise OptionError(f"head is a {type(head).__name__}; allowed is torch.nn.Linear")
        if getattr(head, "activation", "none") != "none":
            raise OptionError(f"head has the activation {head.activation!r}; allowed is none")
        self._head = (head,)  # in a tuple, or it would be a part of this module
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.reduction = reduction

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        reduction: str | None = None,
        exit_weights: Sequence[float] | Tensor | None = None,
    ) -> Tensor:
        """The loss; ``reduction`` in place of the module's own, each exit times its weight (E,)."""
        (head,) = self._head
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        paths: tuple[GradientSlot | None, GradientSlot | None, bool] = (None, None, True)
        if isinstance(head, Linear):
            check_width(hidden, head.in_axis, "LinearCrossEntropy")
            paths = head._gradient_path(weight, bias)
            if head.out_axis.dimension is not None:
                words = head.out_axis.size()
                weight, bias = weight[:words], None if bias is None else bias[:words]
        return run_linear_cross_entropy(
            hidden, weight, bias, target, self.ignore_index, self.label_smoothing,
            reduction or self.reduction, exit_weights, *paths,
        )  # fmt: skip
