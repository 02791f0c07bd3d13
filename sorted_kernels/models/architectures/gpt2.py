"""GPT-2: ``Conv1D`` layers, of which one packs query, key and value."""

from __future__ import annotations

from typing import Any

from sorted_kernels import nn
from sorted_kernels.models.architectures.common import all_of_hidden, head_dim
from sorted_kernels.models.architectures.registry import Form, Rules, register_architecture


def _rules(config: Any) -> Rules:
    heads = ("heads", head_dim(config))
    return {
        "h": {"depth": "depth"},
        "wte": {"features": "hidden"},
        "wpe": {"features": "hidden"},
        "h.*.ln_*": {"features": "hidden"},
        "h.*.attn": {"split_size": heads},
        "h.*.attn.c_attn": {"in": "hidden", "out": heads},
        "h.*.attn.c_proj": {"in": heads, "out": "hidden"},
        "h.*.mlp.c_fc": {"in": "hidden", "out": "ffn"},
        "h.*.mlp.c_proj": {"in": "ffn", "out": "hidden"},
        "ln_f": {"features": "hidden"},
    }


def _configuration(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    all_of_hidden(config, sizes)
    return {
        "n_embd": sizes["hidden"],
        "n_inner": sizes["ffn"],
        "n_layer": sizes["depth"],
        "n_head": sizes["heads"],
    }


register_architecture(
    "gpt2",
    rules=_rules,
    heads={
        name: {"in": "hidden"}
        for name in ("lm_head", "score", "classifier", "qa_outputs", "multiple_choice_head.summary")
    },
    dimensions=lambda config: {"heads": config.num_attention_heads},
    configuration=_configuration,
    forms={"Conv1D": Form(nn.Conv1D, lambda path, _: {"parts": 3 if "c_attn" in path else 1})},
)
