"""BERT-base inside BERT-large: two networks in one set of weights, both trained in turn.

The sub-model has half of the layers and three quarters of everything else: of BERT-large's 24
layers, 1024 features, 16 heads and 4096 neurons these are BERT-base's 12, 768, 12 and 3072. Masked
tokens of Python's own documentation (``pydoc_data``) are learned, a step of one network after a
step of the other; each is judged beside the same network trained alone for as many steps, and the
sub-model is written as an ordinary checkpoint of ``transformers``.

    python examples/bert_in_bert.py                            # a quarter of the sizes, 2 CPU cores
    python examples/bert_in_bert.py --preset gpu               # the real pair, random weights
    python examples/bert_in_bert.py --preset gpu --weights bert-large-uncased  # a local checkpoint
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from soft_smollm2 import windows
from torch import Tensor, nn

import sorted_kernels as sk
from sorted_kernels.data import Batches
from sorted_kernels.inference.files import replacing

MASKED, IGNORED = 0.15, -100


@dataclass(frozen=True)
class Preset:
    """What a run costs.

    Attributes:
        config: Fields of the larger network's ``BertConfig``.
        steps: Optimizer steps of each network.
        batch: Windows a step.
        window: Tokens a window.
        held_out: Windows to judge on.
        lr: Peak learning rate of AdamW.
    """

    config: dict[str, int] = field(default_factory=dict)
    steps: int = 120
    batch: int = 16
    window: int = 64
    held_out: int = 128
    lr: float = 1e-3


def sizes(layers: int, hidden: int, heads: int, ffn: int, **others: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "intermediate_size": ffn, **others,
    }  # fmt: skip


PRESETS = {
    "cpu": Preset(sizes(6, 256, 4, 1024, vocab_size=4096)),
    "gpu": Preset(sizes(24, 1024, 16, 4096), 5000, batch=64, window=128, held_out=512, lr=1e-4),
    "tiny": Preset(
        sizes(4, 32, 4, 64, vocab_size=300), 12, batch=4, window=16, held_out=8, lr=1e-2
    ),
}


def load(preset: Preset, weights: Path | None) -> tuple[nn.Module, Any]:
    """The larger network and its tokenizer, from a local checkpoint or made here."""
    import transformers

    if weights is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
        return transformers.BertForMaskedLM.from_pretrained(weights), tokenizer
    from pydoc_data.topics import topics

    config = transformers.BertConfig(**preset.config)
    tokenizer = transformers.BertTokenizer().train_new_from_iterator(
        topics.values(), config.vocab_size, show_progress=False
    )
    return transformers.BertForMaskedLM(config), tokenizer


def smaller(model: nn.Module) -> sk.Submodel:
    """The sub-model that BERT-base is of BERT-large; heads keep their features."""
    full = sk.nn.dimensions(model)
    heads = full["heads"] * 3 // 4
    return sk.Submodel(
        depth=full["depth"] // 2,
        hidden=full["hidden"] // full["heads"] * heads,
        heads=heads,
        ffn=full["ffn"] * 3 // 4,
    )


def text(tokenizer: Any, size: int) -> list[Tensor]:
    """Python's documentation as training and held-out windows (n, size), between two ends."""

    def tokenize(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [
        F.pad(F.pad(part, (1, 0), value=begin), (0, 1), value=end)
        for part in windows(tokenize, size - 2)
    ]


class Masks:
    """BERT's task: 15% of the tokens are asked for; of those 80% are masked, 10% others."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """(n, S) tokens -> (n, 2, S): what is read, and the labels."""
        words, mask = len(self.tokenizer), self.tokenizer.mask_token_id
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        asked = (torch.rand(ids.shape, generator=generator) < MASKED) & ~special
        kind = torch.rand(ids.shape, generator=generator)
        read = torch.where(asked & (kind < 0.8), mask, ids)
        others = torch.randint(words, ids.shape, generator=generator)
        read = torch.where(asked & (kind >= 0.9), others, read)
        return torch.stack([read, ids.masked_fill(~asked, IGNORED)], 1)


def forward(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (asked, words) and labels of the tokens that are asked for, and of no others."""
    read, labels = batch[0].unbind(1)
    asked = labels != IGNORED
    return model.cls(model.bert(read).last_hidden_state[asked]), labels[asked]


class InTurn(sk.training.Objective):
    """One sub-model a micro-batch, each in its turn."""

    turn = 0

    def choose(self) -> list[sk.Submodel]:
        """The next of the space."""
        self.turn += 1
        return [list(self.space)[self.turn % len(self.space)]]


def train(
    model: nn.Module, networks: Iterable[sk.Submodel], ids: Tensor, masks: Masks, preset: Preset
) -> None:
    """``preset.steps`` steps of each network."""
    space = sk.SubmodelSpace.of(list(networks))
    steps = preset.steps * len(space)
    optimizer = sk.optim.AdamW(model.parameters(), lr=preset.lr)
    autocast = torch.bfloat16 if next(model.parameters()).is_cuda else None
    sk.training.fit(
        model,
        InTurn(space, forward=forward, autocast=autocast),
        Batches(ids, ids, preset.batch, transform=masks),
        optimizer,
        steps=steps,
        scheduler=sk.training.linear(optimizer, steps, warmup=steps // 10),
        max_grad_norm=1.0,
    )


def judge(
    model: nn.Module, networks: Iterable[sk.Submodel], held_out: Tensor
) -> sk.inference.Results:
    """Loss of each network on held-out windows (n, 2, S), always the same tokens asked for."""
    loader = [tuple(part.unbind(1)) for part in held_out.split(16)]
    logits = lambda model, read: model(read).logits  # noqa: E731
    return sk.inference.evaluate(
        model, list(networks), loader, metric="loss", forward=logits, progress=False
    )


def run(preset: Preset, weights: Path | None, out: Path, device: str) -> dict[str, list[float]]:
    """Train in turn and alone; writes the checkpoint and the table, and returns its perplexities.

    Args:
        preset: What it costs.
        weights: Folder of a checkpoint of the larger network; random weights otherwise.
        out: Folder to write to.
        device: Where to train.

    Returns:
        Held-out perplexities of the smaller and of the larger network, by column of the table.
    """
    torch.manual_seed(0)
    model, tokenizer = load(preset, weights)
    sk.elasticize(model.to(device))
    base, large = smaller(model), sk.Submodel(**sk.nn.dimensions(model))
    networks = (base, large)

    ids, held_out = text(tokenizer, preset.window)
    masks = Masks(tokenizer)
    asked = masks(held_out[: preset.held_out], torch.Generator().manual_seed(0)).to(device)
    print(f"{len(ids)} training windows of {preset.window} tokens, {len(asked)} held out")
    if weights is not None:  # a checkpoint's heads and neurons lie in no order
        few = Batches(ids, ids, preset.batch, transform=masks)
        batches = [[t.to(device) for t in batch] for batch, _ in zip(few, range(8), strict=False)]
        sk.models.sort_by_importance(
            model, batches, loss=lambda model, batch: F.cross_entropy(*forward(model, batch))
        )

    before = judge(model, networks, asked)
    found = {"before": before}
    alone = {large: copy.deepcopy(model), base: sk.elasticize(sk.export(model, base))}
    train(model, networks, ids, masks, preset)
    found["in turn"] = judge(model, networks, asked)
    folder = out / "base"
    sk.export(model, base).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = []
    for network in networks:
        train(alone[network], [network], ids, masks, preset)
        rows += judge(alone.pop(network), [network], asked).rows
    found["alone"] = sk.inference.Results(rows, metric="loss", higher_is_better=False)

    perplexity = {
        name: [math.exp(results[network].metric) for network in networks]
        for name, results in found.items()
    }
    report(out, before, networks, perplexity)
    print(f"wrote {folder}, which transformers loads")
    return perplexity


def report(
    out: Path,
    results: sk.inference.Results,
    networks: Sequence[sk.Submodel],
    perplexity: dict[str, list[float]],
) -> None:
    """Print the table, and write it."""
    header = ["network", "parameters", "MFLOP a window", *perplexity]
    lines = []
    for index, network in enumerate(networks):
        row = results[network]
        values = [f"{values[index]:.2f}" for values in perplexity.values()]
        lines.append([str(network), f"{row.parameters:,}", f"{row.flops / 1e6:,.0f}", *values])
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    print("\nheld-out perplexity of masked tokens")
    for line in (header, *lines):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    with replacing(out / "perplexity.csv") as path, open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *lines])


def main(given: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--weights", type=Path, help="folder of a checkpoint of the larger network")
    parser.add_argument("--out", type=Path, default=Path("runs/bert_in_bert"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(given)
    return run(PRESETS[options.preset], options.weights, options.out, options.device)


if __name__ == "__main__":
    main()
