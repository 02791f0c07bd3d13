"""BERT and RoBERTa: learned positions, layer norms after each part, a pooler, several heads."""

from sorted_kernels.models.architectures import common
from sorted_kernels.models.architectures.common import HIDDEN, SQUARE
from sorted_kernels.models.architectures.registry import register_architecture

_BLOCK = "encoder.layer.*"

register_architecture(
    "bert",
    "roberta",
    rules=lambda config: {
        "embeddings.*_embeddings": HIDDEN,
        "**.LayerNorm": HIDDEN,
        "encoder.layer": {"depth": "depth"},
        **common.attention(
            config, f"{_BLOCK}.attention", "self.query", "self.key", "self.value", "output.dense"
        ),
        **common.feed_forward(_BLOCK, "intermediate.dense", output="output.dense"),
        "pooler.dense": SQUARE,
    },
    heads={
        "cls.predictions.transform.dense": SQUARE,
        "cls.predictions.transform.LayerNorm": HIDDEN,
        "lm_head.dense": SQUARE,
        "lm_head.layer_norm": HIDDEN,
        "classifier.dense": SQUARE,
        **common.reading_hidden(
            "cls.predictions.decoder", "cls.seq_relationship", "lm_head.decoder", "qa_outputs",
            "classifier", "classifier.out_proj",
        ),
    },
    **common.described_by(free_head_dim=False),
    fixed=("cls.predictions", "lm_head"),  # biases of the vocabulary
)  # fmt: skip
