"""BERT and RoBERTa: learned positions, layer norms after each part, a pooler, several heads."""

from __future__ import annotations

from typing import Any

from sorted_kernels.models.architectures.common import all_of_hidden, head_dim
from sorted_kernels.models.architectures.registry import Rules, register_architecture

_HIDDEN = {"features": "hidden"}
_SQUARE = {"in": "hidden", "out": "hidden"}
_HEADS: dict[str, Any] = {
    "cls.predictions.transform.dense": _SQUARE,
    "cls.predictions.transform.LayerNorm": _HIDDEN,
    "lm_head.dense": _SQUARE,
    "lm_head.layer_norm": _HIDDEN,
    "classifier.dense": _SQUARE,
    **dict.fromkeys(
        ("cls.predictions.decoder", "cls.seq_relationship", "lm_head.decoder", "classifier",
         "classifier.out_proj", "qa_outputs"), {"in": "hidden"},
    ),
}  # fmt: skip


def _rules(config: Any) -> Rules:
    heads = ("heads", head_dim(config))
    return {
        "embeddings.*_embeddings": _HIDDEN,
        "**.LayerNorm": _HIDDEN,
        "encoder.layer": {"depth": "depth"},
        **{f"encoder.layer.*.attention.self.{name}": {"in": "hidden", "out": heads}
           for name in ("query", "key", "value")},
        "encoder.layer.*.attention.output.dense": {"in": heads, "out": "hidden"},
        "encoder.layer.*.intermediate.dense": {"in": "hidden", "out": "ffn"},
        "encoder.layer.*.output.dense": {"in": "ffn", "out": "hidden"},
        "pooler.dense": _SQUARE,
    }  # fmt: skip


def _configuration(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    all_of_hidden(config, sizes)
    return {
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
    }


register_architecture(
    "bert",
    "roberta",
    rules=_rules,
    heads=_HEADS,
    dimensions=lambda config: {"heads": config.num_attention_heads},
    configuration=_configuration,
    fixed=("cls.predictions", "lm_head"),  # biases of the vocabulary
)
