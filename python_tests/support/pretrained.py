"""Tiny models of ``transformers``, and sub-models that their configurations can say."""

import random

import pytest
import torch

import sorted_kernels as sk

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="transformers 5 is not installed (extra 'hf')"
)

VOCABULARY = 50
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def _llama(**options):
    config = transformers.LlamaConfig(**{**DECODER, "head_dim": 8, **options})
    return transformers.LlamaForCausalLM(config)


def _mistral():
    config = transformers.MistralConfig(**DECODER, head_dim=6, sliding_window=4)
    return transformers.MistralForCausalLM(config)


def _qwen2():
    config = transformers.Qwen2Config(
        **DECODER, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    return transformers.Qwen2ForCausalLM(config)


def _classifier():
    config = transformers.LlamaConfig(**DECODER, num_labels=3)
    return transformers.LlamaForSequenceClassification(config)


DECODERS = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": _mistral,
    "qwen2": _qwen2,
}
MODELS = {**DECODERS, "llama-classifier": _classifier}


def plain(name, seed=0):
    """An untouched model in evaluation mode, its biases and norms random too."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(torch.randn_like(param) / 4)
            else:
                param.mul_(8)  # initial weights are so small that all logits are alike
    return model


def elastic(name, seed=0):
    """The same model made elastic."""
    return sk.elasticize(plain(name, seed))


def inputs(name, seed=0):
    """A batch for a model."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator)}


def submodel(name, seed):
    """A random sub-model that the model's configuration can describe."""
    draw = random.Random(seed)
    heads = draw.choice([3, 6])
    return sk.Submodel(
        depth=draw.randint(1, 3),
        hidden=heads * draw.randint(1, 24 // heads),
        heads=heads,
        ffn=draw.randint(1, 40),
    )


def out(model, batch, **options):
    """The first output of a forward."""
    return model(**batch, **options)[0]
