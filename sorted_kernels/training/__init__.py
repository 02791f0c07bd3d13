"""Training every sub-model at once: objectives, loop, schedules, checkpoints."""

from sorted_kernels.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from sorted_kernels.training.language import CausalLM, SequenceClassification
from sorted_kernels.training.loop import fit
from sorted_kernels.training.objectives import (
    Objective,
    Sandwich,
    Stochastic,
    StochasticSummation,
    Summation,
)
from sorted_kernels.training.schedules import cosine, linear
from sorted_kernels.training.state import History

__all__ = [
    "CausalLM",
    "Checkpoint",
    "History",
    "Objective",
    "Sandwich",
    "SequenceClassification",
    "Stochastic",
    "StochasticSummation",
    "Summation",
    "cosine",
    "fit",
    "latest_checkpoint",
    "linear",
    "load_checkpoint",
    "save_checkpoint",
]
