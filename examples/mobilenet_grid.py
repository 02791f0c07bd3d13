"""160 MobileNetV2 in one: 16 depths x 10 widths (SortedNet, sections 4.1 and 4.2).

All are trained at once by the stochastic loss, judged, and drawn as a heat map; those that keep a
part of the best accuracy are selected and trained again from scratch, as a space of their own.

    python examples/mobilenet_grid.py                      # digits, a few minutes on 2 cores
    python examples/mobilenet_grid.py --preset cifar10 --data cifar-10-python.tar.gz  # a GPU

The paper's network is google/mobilenet_v2_1.4_224: ``--model`` takes a local copy of it, otherwise
its configuration starts from random weights. The paper gives 60 epochs a sub-model, batch 128,
AdamW, a linear schedule and seed 4242; other values are the defaults of transformers' Trainer.
Its batch norms keep shared statistics. Those of transformers' MobileNetV2 follow the last batch
alone (momentum 0.997), whichever sub-model that was, so here each sub-model's statistics are
measured before it is judged; ``--shared-statistics`` leaves that out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sorted_kernels as sk
from sorted_kernels.data import Images, cifar10, digit_images

DEPTHS, WIDTHS = range(1, 17), range(1, 11)


@dataclass(frozen=True)
class Preset:
    """How a preset trains; ``epochs`` is for all sub-models together."""

    config: dict[str, object]
    epochs: int
    batch_size: int
    lr: float
    threshold: float  # percent of the best accuracy that a selected sub-model keeps
    seed: int = 4242


PRESETS = {
    "digits": Preset(
        {
            "num_channels": 1, "image_size": 32, "depth_multiplier": 0.35, "min_depth": 2,
            "depth_divisible_by": 2, "finegrained_output": False, "output_stride": 8,
            "classifier_dropout_prob": 0.0,
        },
        epochs=60, batch_size=64, lr=4e-3, threshold=97.0,
    ),
    "cifar10": Preset(
        {"depth_multiplier": 1.4, "image_size": 224},
        epochs=60 * len(DEPTHS) * len(WIDTHS), batch_size=128, lr=5e-5, threshold=90.0,
    ),
}  # fmt: skip


def images(preset: str, path: Path | None) -> Images:
    """Digits or CIFAR-10 for a preset."""
    return digit_images(32) if preset == "digits" else cifar10(path or Path("cifar-10-batches-py"))


def network(preset: Preset, folder: Path | None = None) -> torch.nn.Module:
    """The elastic network: a local checkpoint, or random weights."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(preset.seed)
    if folder is not None:
        model = MobileNetV2ForImageClassification.from_pretrained(
            folder, num_labels=10, ignore_mismatched_sizes=True
        )
    else:
        model = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=10, **preset.config))
    return sk.elasticize(model)


def logits(model: torch.nn.Module, x: Tensor) -> Tensor:
    """(n, channels, side, side) -> (n, 10), enlarged to the side that the network is for."""
    side = model.config.image_size
    if x.shape[-1] != side:
        x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    return model(x).logits


def train(model: torch.nn.Module, space: sk.SubmodelSpace, data: Images, preset: Preset) -> None:
    """The stochastic loss over a space."""
    loader = data.train_loader(preset.batch_size, seed=preset.seed)
    objective = sk.training.Stochastic(
        space, forward=lambda m, batch: (logits(m, batch[0]), batch[1]), seed=preset.seed
    )
    optimizer = sk.optim.AdamW(model.parameters(), lr=preset.lr)
    steps = preset.epochs * len(loader)
    schedule = sk.training.linear(optimizer, steps)
    sk.training.fit(model, objective, loader, optimizer, steps=steps, scheduler=schedule)


def judge(
    model: torch.nn.Module,
    space: sk.SubmodelSpace,
    data: Images,
    preset: Preset,
    shared_statistics: bool = False,
) -> sk.inference.Results:
    """Accuracy of every sub-model, each with statistics of its own."""
    if not shared_statistics:
        for submodel in space:
            loader = data.train_loader(preset.batch_size, augment=False, seed=preset.seed)
            sk.inference.recalibrate(model, submodel, loader, batches=5, forward=logits)
    return sk.inference.evaluate(model, space, data.test_loader(), forward=logits)


def select(results: sk.inference.Results, threshold: float) -> sk.SubmodelSpace:
    """The sub-models that keep ``threshold`` percent of the best accuracy (section 4.2)."""
    return sk.SubmodelSpace.of(
        [row.submodel for row in results if results.recovery(row) >= threshold]
    )


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--data", type=Path, help="CIFAR-10: its .tar.gz or its folder")
    parser.add_argument("--model", type=Path, help="folder of a MobileNetV2 checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/mobilenet"))
    parser.add_argument("--epochs", type=int, help="in place of the preset's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def prepare(options: argparse.Namespace) -> tuple[Preset, Images]:
    preset = PRESETS[options.preset]
    if options.epochs is not None:
        preset = replace(preset, epochs=options.epochs)
    return preset, images(options.preset, options.data).to(options.device)


def main(given: list[str] | None = None) -> sk.SubmodelSpace:
    parser = arguments("160 MobileNetV2 in one")
    parser.add_argument("--shared-statistics", action="store_true")
    options = parser.parse_args(given)
    preset, data = prepare(options)
    space, name = sk.SubmodelSpace(depth=DEPTHS, width=WIDTHS), "all"
    for name in ("all", "selected"):
        model = network(preset, options.model).to(options.device)
        train(model, space, data, preset)
        results = judge(model, space, data, preset, options.shared_statistics)
        options.out.mkdir(parents=True, exist_ok=True)
        results.to_csv(options.out / f"{name}.csv")
        sk.inference.heat_map(results, options.out / f"{name}.png")
        best, largest = results.best, results[space.largest]
        print(f"{name}: {len(results)} sub-models, best {100 * best.metric:.2f}% ({best.submodel})")
        print(f"  deepest and widest {100 * largest.metric:.2f}%; {options.out / f'{name}.png'}")
        space = select(results, preset.threshold)
    print(f"{len(space)} keep {preset.threshold:g}% of the best")
    return space


if __name__ == "__main__":
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    main()
