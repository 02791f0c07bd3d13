"""SGD that moves only what a step has touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError
from sorted_kernels.ops import optimizer  # noqa: F401  (defines the ops)
from sorted_kernels.optim.base import Bucket, StaircaseOptimizer


class SGD(StaircaseOptimizer):
    """SGD with momentum on the staircase of each gradient.

    With ``update="active"`` only elements inside the staircase move, with their momentum and decay.
    With ``update="whole"`` it equals ``torch.optim.SGD`` to rounding.

    Args:
        params: Parameters or parameter groups, as in torch.
        lr: Learning rate.
        momentum: Decay of the momentum, in [0, 1); 0 for none.
        weight_decay: Added to the gradient (coupled, as in torch).
        nesterov: Look ahead by one momentum step; needs momentum.
        maximize: Go up the gradient.
        update: ``"active"`` or ``"whole"``.
        clear_grads: Zero the gradients in the same pass (``zero_grad`` is then not needed).

    Raises:
        OptionError: A value outside what is allowed.
    """

    STATES = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        update: str = "active",
        clear_grads: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise OptionError(f"momentum={momentum!r} must be in [0, 1)")
        if nesterov and momentum == 0:
            raise OptionError("nesterov=True needs a momentum above 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, update, clear_grads)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.STATES if group["momentum"] else ()

    def _apply(self, group: dict[str, Any], bucket: Bucket, params: list[Tensor]) -> None:
        torch.ops.sorted_kernels.staircase_sgd_.default(
            params,
            bucket.grads,
            bucket.states[0] if bucket.states else [],
            bucket.masters,
            bucket.bands,
            float(group["lr"]),
            group["momentum"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
            self.clear_grads,
        )
