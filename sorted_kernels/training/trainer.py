"""``transformers.Trainer`` that trains sub-models; imported by name, as it needs that package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sorted_kernels.errors import CheckpointError, OptionError
from sorted_kernels.optim import AdamW
from sorted_kernels.training.objectives import Objective

_STATE = "objective.pt"


class SortedTrainer(transformers.Trainer):
    """``transformers.Trainer`` whose steps are those of an objective.

    Everything else is the Trainer's: arguments, schedule, accumulation, clipping, callbacks,
    checkpoints, which hold the objective's draws too, and resuming. Without an optimizer of
    one's own it trains with :class:`sorted_kernels.optim.AdamW`, which moves what a step touched.

    Args:
        *args: What ``transformers.Trainer`` takes; the model is elastic.
        objective: What a micro-batch trains. ``bf16=True`` in the arguments runs it under
            autocast, if it has no dtype of its own.
        **options: What ``transformers.Trainer`` takes.

    Raises:
        OptionError: ``objective`` is none, or the arguments ask for fp16, whose loss scaling
            objectives do not do.
    """

    objective: Objective
    model: torch.nn.Module
    optimizer: Any

    def __init__(self, *args: Any, objective: Objective, **options: Any) -> None:
        if not isinstance(objective, Objective):
            raise OptionError(f"objective is {objective!r}; allowed is one of sk.training")
        super().__init__(*args, **options)
        if self.args.fp16:
            raise OptionError("fp16=True is not supported; allowed is bf16=True")
        if self.args.bf16 and objective.autocast is None:
            objective.autocast = torch.bfloat16
        self.objective = objective

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of what the objective chooses; returns its share of the loss."""
        model.train()
        scale = 1.0 / self.current_gradient_accumulation_steps
        loss = self.objective(model, self._prepare_inputs(inputs), scale)
        return loss * scale

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        """The optimizer that was given, or AdamW on the staircase with the Trainer's groups."""
        if self.optimizer is None:
            decaying = set(self.get_decay_parameter_names(self.model))
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [
                {"params": [p for n, p in named if n in decaying]},
                {"params": [p for n, p in named if n not in decaying], "weight_decay": 0.0},
            ]
            self.optimizer = AdamW(
                [group for group in groups if group["params"]],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self.objective.state_dict(), Path(output_dir) / _STATE)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / _STATE
        if not path.is_file():
            raise CheckpointError(f"{checkpoint} has no {_STATE}: SortedTrainer did not write it")
        self.objective.load_state_dict(torch.load(path, weights_only=True))
