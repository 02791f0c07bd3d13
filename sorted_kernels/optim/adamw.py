"""AdamW that moves only what a step has touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError
from sorted_kernels.ops import optimizer  # noqa: F401  (defines the ops)
from sorted_kernels.optim.base import Bucket, StaircaseOptimizer


class AdamW(StaircaseOptimizer):
    """AdamW (Loshchilov and Hutter 2019) on the staircase of each gradient.

    With ``update="active"`` only elements inside the staircase move, with their moments and decay:
    the rule of SortedNet and DyLoRA, by which a step trains the sampled sub-models and leaves the
    others alone. A parameter's step count, which corrects its moments' bias, goes up whenever any
    part of it moves. With ``update="whole"`` it equals ``torch.optim.AdamW`` to rounding.

    Args:
        params: Parameters or parameter groups, as in torch.
        lr: Learning rate.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the denominator.
        weight_decay: Decoupled decay.
        maximize: Go up the gradient.
        update: ``"active"`` or ``"whole"``.
        clear_grads: Zero the gradients in the same pass (``zero_grad`` is then not needed).

    Raises:
        OptionError: A value outside what is allowed.
    """

    STATES = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        update: str = "active",
        clear_grads: bool = False,
    ) -> None:
        for beta in betas:
            if not 0 <= beta < 1:
                raise OptionError(f"betas={betas} must each be in [0, 1)")
        if not eps >= 0:
            raise OptionError(f"eps={eps!r} must be at least 0")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, update, clear_grads)

    def _apply(self, group: dict[str, Any], bucket: Bucket, params: list[Tensor]) -> None:
        torch.ops.sorted_kernels.staircase_adamw_.default(
            params,
            bucket.grads,
            *bucket.states,
            bucket.masters,
            bucket.bands,
            bucket.steps,
            float(group["lr"]),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["maximize"],
            self.clear_grads,
        )
