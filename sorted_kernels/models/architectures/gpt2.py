"""GPT-2: ``Conv1D`` layers, of which one packs query, key and value."""

from sorted_kernels import nn
from sorted_kernels.models.architectures import common
from sorted_kernels.models.architectures.common import HIDDEN
from sorted_kernels.models.architectures.registry import Form, register_architecture

register_architecture(
    "gpt2",
    rules=lambda config: {
        "h": {"depth": "depth"},
        "wte": HIDDEN,
        "wpe": HIDDEN,
        "h.*.ln_*": HIDDEN,
        "h.*.attn": {"split_size": ("heads", common.head_dim(config))},
        **common.attention(config, "h.*.attn", "c_attn", "c_attn", "c_attn", output="c_proj"),
        **common.feed_forward("h.*.mlp", "c_fc", output="c_proj"),
        "ln_f": HIDDEN,
    },
    heads=common.reading_hidden(
        "lm_head", "score", "classifier", "qa_outputs", "multiple_choice_head.summary"
    ),
    **common.described_by(
        hidden=("n_embd",), ffn="n_inner", depth="n_layer", heads="n_head", free_head_dim=False
    ),
    forms={"Conv1D": Form(nn.Conv1D, lambda path, _: {"parts": 3 if "c_attn" in path else 1})},
)
