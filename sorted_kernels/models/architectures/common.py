"""What several tables say alike."""

from __future__ import annotations

from typing import Any

from sorted_kernels import nn
from sorted_kernels.models.architectures.registry import Form


def _rms_norm(_path: str, module: Any) -> dict[str, Any]:
    return {
        "normalized_shape": tuple(module.weight.shape),
        "eps": module.variance_epsilon,
        "elementwise_affine": True,
    }


RMS_NORM = Form(nn.RMSNorm, _rms_norm)
"""The RMS norm of ``transformers``, one class of the same code in each model."""


def head_dim(config: Any) -> int:
    """Features of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def whole_groups(config: Any, heads: int) -> tuple[int, int]:
    """Query and key-value heads of a sub-model: whole groups, rounded up."""
    group = config.num_attention_heads // config.num_key_value_heads
    groups = -(-heads // group)
    return groups * group, groups


def kept_head_dim(config: Any, hidden: int, heads: int) -> dict[str, int]:
    """The field ``head_dim``, where the configuration has it or a sub-model needs it."""
    one = head_dim(config)
    needed = hasattr(config, "head_dim") or hidden != heads * one
    return {"head_dim": one} if needed else {}
