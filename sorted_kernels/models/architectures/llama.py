"""LLaMA and its kin: rotary positions, RMS norms, gated feed-forward, grouped key-value heads."""

from sorted_kernels.models.architectures import common
from sorted_kernels.models.architectures.common import HIDDEN
from sorted_kernels.models.architectures.registry import register_architecture

register_architecture(
    "llama",
    "mistral",
    "qwen2",
    rules=lambda config: {
        "layers": {"depth": "depth"},
        "embed_tokens": HIDDEN,
        "layers.*.*_layernorm": HIDDEN,
        **common.attention(
            config, "layers.*.self_attn", "q_proj", "k_proj", "v_proj", output="o_proj"
        ),
        **common.feed_forward("layers.*.mlp", "gate_proj", "up_proj", output="down_proj"),
        "norm": HIDDEN,
    },
    heads=common.reading_hidden("lm_head", "score", "qa_outputs"),
    **common.described_by(free_head_dim=True),
    forms=dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"), common.RMS_NORM),
)
