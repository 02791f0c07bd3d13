"""Optimizers that touch only the staircase of each gradient."""

from sorted_kernels.optim.adamw import AdamW
from sorted_kernels.optim.base import clip_grad_norm_
from sorted_kernels.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "clip_grad_norm_"]
