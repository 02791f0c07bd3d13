"""ViT: patches by a strided convolution, a class token, layer norms before each part."""

from sorted_kernels.models.architectures import common
from sorted_kernels.models.architectures.common import HIDDEN
from sorted_kernels.models.architectures.registry import register_architecture

register_architecture(
    "vit",
    rules=lambda config: {
        "embeddings": {"cls_token[-1]": "hidden", "position_embeddings[-1]": "hidden"},
        "embeddings.patch_embeddings.projection": {"weight[0]": "hidden", "bias[0]": "hidden"},
        "layers": {"depth": "depth"},
        "layers.*.layernorm_*": HIDDEN,
        **common.attention(
            config, "layers.*.attention", "q_proj", "k_proj", "v_proj", output="o_proj"
        ),
        **common.feed_forward("layers.*.mlp", "fc1", output="fc2"),
        "layernorm": HIDDEN,
        "pooler.dense": {
            "in": "hidden",
            **({"out": "hidden"} if config.pooler_output_size == config.hidden_size else {}),
        },
    },
    heads=common.reading_hidden("classifier"),
    **common.described_by(hidden=("hidden_size", "pooler_output_size"), free_head_dim=True),
)
