"""LLaMA and its kin: rotary positions, RMS norms, gated feed-forward, grouped key-value heads."""

from __future__ import annotations

from typing import Any

from sorted_kernels.models.architectures.common import (
    RMS_NORM,
    head_dim,
    kept_head_dim,
    whole_groups,
)
from sorted_kernels.models.architectures.registry import Rules, register_architecture
from sorted_kernels.nn.axis import AxisSpec


def _rules(config: Any) -> Rules:
    one = head_dim(config)
    group = config.num_attention_heads // config.num_key_value_heads
    key_value: dict[str, AxisSpec] = {"in": "hidden", "out": ("heads", one)}
    return {
        "layers": {"depth": "depth"},
        "embed_tokens": {"features": "hidden"},
        "layers.*.*_layernorm": {"features": "hidden"},
        "layers.*.self_attn.q_proj": {"in": "hidden", "out": ("heads", one * group)},
        "layers.*.self_attn.k_proj": key_value,
        "layers.*.self_attn.v_proj": key_value,
        "layers.*.self_attn.o_proj": {"in": ("heads", one * group), "out": "hidden"},
        "layers.*.mlp.gate_proj": {"in": "hidden", "out": "ffn"},
        "layers.*.mlp.up_proj": {"in": "hidden", "out": "ffn"},
        "layers.*.mlp.down_proj": {"in": "ffn", "out": "hidden"},
        "norm": {"features": "hidden"},
    }


def _configuration(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    heads, key_value_heads = whole_groups(config, sizes["heads"])
    fields = {
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        **kept_head_dim(config, sizes["hidden"], heads),
    }
    if getattr(config, "layer_types", None) is not None:
        fields["layer_types"] = config.layer_types[: sizes["depth"]]
    return fields


register_architecture(
    "llama",
    "mistral",
    "qwen2",
    rules=_rules,
    heads={name: {"in": "hidden"} for name in ("lm_head", "score", "qa_outputs")},
    dimensions=lambda config: {"heads": config.num_attention_heads},
    configuration=_configuration,
    forms=dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"), RMS_NORM),
)
