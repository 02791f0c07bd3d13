"""Training step of one LLaMA block of ``transformers`` at a quarter, half and all of its size."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sorted_kernels as sk
from bench import shapes
from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.shapes import BlockShape
from bench.torch_contestants import ADAMW, fused_adamw


def _model(shape: BlockShape, device: torch.device) -> Any:
    """A model of one block; its embedding is so small that it costs nothing."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=shape.HIDDEN,
        intermediate_size=shape.FFN,
        num_hidden_layers=1,
        num_attention_heads=shape.HEADS,
        num_key_value_heads=shape.HEADS // shape.GROUP,
        head_dim=shape.HIDDEN // shape.HEADS,
    )
    model = LlamaModel(config).to(device)
    with torch.no_grad():  # weights large enough for the block to do something
        for param in model.layers.parameters():
            if param.dim() > 1:
                param.mul_(2.0)
    return sk.elasticize(model)


def _submodel(shape: BlockShape) -> sk.Submodel:
    return sk.Submodel(hidden=shape.hidden, heads=shape.heads, ffn=shape.ffn)


def _contestant(
    model: Any,
    optimizer_of: Callable[[Any], torch.optim.Optimizer],
    shape: BlockShape,
    device: torch.device,
) -> Contestant:
    """A training step of the block; its outcome is the block's output after all steps so far."""
    block: nn.Module = model.layers[0]
    optimizer = optimizer_of(block.parameters())
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.batch, shape.length, shape.hidden)
    x = torch.randn(size, generator=generator, device=device).requires_grad_()
    dy = torch.randn(size, generator=generator, device=device)
    position_ids = torch.arange(shape.length, device=device)[None]
    positions = model.rotary_emb(x.detach(), position_ids=position_ids)

    def forward() -> Tensor:
        return block(x, position_embeddings=positions, attention_mask=None)

    def step() -> None:
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        forward().backward(dy)
        optimizer.step()

    @torch.no_grad()
    def output() -> list[Tensor]:
        return [forward()]

    return Contestant(step, output)


def _standalone(shape: BlockShape, device: torch.device) -> Contestant:
    """B2: the exported model, plain ``transformers`` with contiguous weights, and torch's AdamW."""
    model = sk.export(_model(shape, device), _submodel(shape))
    return _contestant(model, fused_adamw, shape, device)


def _ours(shape: BlockShape, device: torch.device) -> Contestant:
    """The shared weights with the sub-model active, and this library's AdamW."""
    model = _model(shape, device)
    sk.activate(model, _submodel(shape))
    return _contestant(model, partial(sk.optim.AdamW, **ADAMW), shape, device)


def make_case(shape: BlockShape, device: torch.device) -> Case:
    """Both contestants at one size."""
    rows = shape.batch * shape.length
    one = shape.HIDDEN // shape.HEADS
    projections = (2 + 2 / shape.GROUP) * shape.heads * one + 3 * shape.ffn
    attention = 4 * rows * shape.length * shape.heads * one
    return Case(
        kernel="transformer_step",
        mode="train",
        sizes=str(shape),
        dtype=torch.float32,
        contestants={
            "B2": partial(_standalone, shape, device),
            "ours": partial(_ours, shape, device),
        },
        device=device,
        flops=3 * (int(2 * rows * shape.hidden * projections) + attention),
        tolerance=1e-2,
        goals=goals_for("transformer_step", "train", {}, "float32", device.type == "cuda"),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """A quarter, half and all of hidden, heads and ffn; nothing without ``transformers``."""
    if importlib.util.find_spec("transformers") is None:
        print("transformer_step left out: transformers is not installed (extra 'hf')")
        return []
    chosen = [shapes.BLOCK_QUICK] if quick else shapes.BLOCK
    return [make_case(shape, device) for shape in chosen]


def test_transformer_step(case, provider, measure):
    measure(case, provider)
