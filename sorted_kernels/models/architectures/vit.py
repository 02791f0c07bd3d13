"""ViT: patches by a strided convolution, a class token, layer norms before each part."""

from __future__ import annotations

from typing import Any

from sorted_kernels.models.architectures.common import head_dim, kept_head_dim
from sorted_kernels.models.architectures.registry import Rules, register_architecture


def _rules(config: Any) -> Rules:
    heads = ("heads", head_dim(config))
    pooled = {"out": "hidden"} if config.pooler_output_size == config.hidden_size else {}
    return {
        "embeddings": {"cls_token[-1]": "hidden", "position_embeddings[-1]": "hidden"},
        "embeddings.patch_embeddings.projection": {"weight[0]": "hidden", "bias[0]": "hidden"},
        "layers": {"depth": "depth"},
        "layers.*.layernorm_*": {"features": "hidden"},
        **{f"layers.*.attention.{name}_proj": {"in": "hidden", "out": heads} for name in "qkv"},
        "layers.*.attention.o_proj": {"in": heads, "out": "hidden"},
        "layers.*.mlp.fc1": {"in": "hidden", "out": "ffn"},
        "layers.*.mlp.fc2": {"in": "ffn", "out": "hidden"},
        "layernorm": {"features": "hidden"},
        "pooler.dense": {"in": "hidden", **pooled},
    }


def _configuration(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    fields = {
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
        **kept_head_dim(config, sizes["hidden"], sizes["heads"]),
    }
    if config.pooler_output_size == config.hidden_size:
        fields["pooler_output_size"] = sizes["hidden"]
    return fields


register_architecture(
    "vit",
    rules=_rules,
    heads={"classifier": {"in": "hidden"}},
    dimensions=lambda config: {"heads": config.num_attention_heads},
    configuration=_configuration,
)
