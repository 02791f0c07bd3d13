"""What tables of transformers say alike: the rules of their parts, the fields of their sizes."""

from __future__ import annotations

from typing import Any

from sorted_kernels import nn
from sorted_kernels.errors import DimensionError
from sorted_kernels.models.architectures.registry import Form, Rules

HIDDEN = {"features": "hidden"}
"""Axes of a norm, and of an embedding."""
SQUARE = {"in": "hidden", "out": "hidden"}
"""Axes of a linear layer from the hidden features to the hidden features."""


def head_dim(config: Any) -> int:
    """Features of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention(config: Any, path: str, query: str, key: str, value: str, output: str) -> Rules:
    """Rules of the projections at ``path``; sub-models have whole groups of heads.

    Args:
        config: The model's configuration; without ``num_key_value_heads`` each head has its own.
        path: Of the attention module.
        query: Path from there; the same as ``key`` and ``value`` where one module packs all three.
        key: As ``query``.
        value: As ``query``.
        output: As ``query``.
    """
    one = head_dim(config)
    group = one * config.num_attention_heads // _key_value_heads(config)
    return {
        f"{path}.{key}": {"in": "hidden", "out": ("heads", one)},
        f"{path}.{value}": {"in": "hidden", "out": ("heads", one)},
        f"{path}.{query}": {"in": "hidden", "out": ("heads", group)},
        f"{path}.{output}": {"in": ("heads", group), "out": "hidden"},
    }


def feed_forward(path: str, *inner: str, output: str) -> Rules:
    """Rules of the linear layers at ``path`` that enter and leave the feed-forward neurons."""
    rules: dict[str, Any] = {f"{path}.{name}": {"in": "hidden", "out": "ffn"} for name in inner}
    return {**rules, f"{path}.{output}": {"in": "ffn", "out": "hidden"}}


def reading_hidden(*paths: str) -> dict[str, Any]:
    """Rules of heads that read the hidden features."""
    return {path: {"in": "hidden"} for path in paths}


def described_by(
    *,
    hidden: tuple[str, ...] = ("hidden_size",),
    ffn: str = "intermediate_size",
    depth: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    free_head_dim: bool,
) -> dict[str, Any]:
    """``dimensions`` and ``configuration`` of a table, from the fields that hold the sizes.

    Args:
        hidden: The field of the hidden size, and those that are changed where they are equal to it.
        ffn: Field of the feed-forward size.
        depth: Field of the number of blocks; ``layer_types`` is cut to it.
        heads: Field of the number of heads; ``num_key_value_heads`` follows where it is.
        free_head_dim: Whether the models read ``head_dim``; otherwise it is hidden size over heads.
    """

    def configuration(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
        full = getattr(config, hidden[0])
        fields = {name: sizes["hidden"] for name in hidden if getattr(config, name) == full}
        groups, whole = _key_value_heads(config), getattr(config, heads)
        kept = -(-sizes["heads"] * groups // whole)
        count, one = kept * (whole // groups), head_dim(config)
        fields |= {ffn: sizes["ffn"], depth: sizes["depth"], heads: count}
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = kept
        if free_head_dim and (hasattr(config, "head_dim") or sizes["hidden"] != count * one):
            fields["head_dim"] = one
        elif not free_head_dim and sizes["hidden"] != count * one:
            raise DimensionError(
                f"it has no head_dim, so hidden must be heads * {one} = {count * one}"
            )
        if getattr(config, "layer_types", None) is not None:
            fields["layer_types"] = config.layer_types[: sizes["depth"]]
        return fields

    return {
        "dimensions": lambda config: {"heads": getattr(config, heads)},
        "configuration": configuration,
    }


def _key_value_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _rms_norm(_path: str, module: Any) -> dict[str, Any]:
    return {
        "normalized_shape": tuple(module.weight.shape),
        "eps": module.variance_epsilon,
        "elementwise_affine": True,
    }


RMS_NORM = Form(nn.RMSNorm, _rms_norm)
"""The RMS norm of ``transformers``, one class of the same code in each model."""
