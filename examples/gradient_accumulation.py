"""SortedNet's Tables 5 and 6: how many micro-batches, each of one sub-model, make a step.

cPreResNet20 with instance norm, widths 25, 50, 75 and 100%, the stochastic loss. In Table 5 all
make as many optimizer steps, so more accumulation takes more epochs; in Table 6 all take as many
epochs, so more accumulation makes fewer steps.

    python examples/gradient_accumulation.py               # digits, a few minutes on 2 cores
    python examples/gradient_accumulation.py --preset cifar10 --data cifar-10-python.tar.gz  # a GPU
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import sorted_kernels as sk
from sorted_kernels.data import Images, cifar10, digit_images
from sorted_kernels.models import elastic_cpreresnet20
from sorted_kernels.training.baselines import METHODS, Hyperparameters, train

WIDTHS = (4, 8, 12, 16)


@dataclass(frozen=True)
class Preset:
    """The epochs are those of one micro-batch a step."""

    epochs: int
    batch_size: int
    block: str
    augment: bool
    seeds: tuple[int, ...] = (40, 42, 1010, 4242)


PRESETS = {
    "digits": Preset(epochs=30, batch_size=64, block="basic", augment=False, seeds=(40, 42)),
    "cifar10": Preset(epochs=200, batch_size=128, block="bottleneck", augment=True),
}
# Accuracies as printed in the paper (arXiv:2309.00255v2), width 100, 75, 50, 25%.
PAPER = {
    "5": {1: (84.94, 84.92, 82.54, 71.03), 2: (86.69, 86.68, 84.40, 72.36),
          3: (87.37, 87.50, 84.57, 73.00), 4: (87.93, 87.40, 84.27, 76.23)},
    "6": {1: (84.94, 84.92, 82.54, 71.03), 2: (85.01, 85.12, 82.24, 70.65),
          3: (85.09, 85.06, 82.64, 73.74), 4: (86.05, 86.06, 83.66, 73.00)},
}  # fmt: skip


def accuracies(
    data: Images, preset: Preset, steps: int, accumulate: int, seed: int, device: str
) -> tuple[float, ...]:
    """Percent right at each width, widest first."""
    torch.manual_seed(seed)
    model = elastic_cpreresnet20(data.shape[0], norm="instance", block=preset.block).to(device)
    loader = data.train_loader(preset.batch_size, augment=preset.augment, seed=seed)
    objective = METHODS["sorted"].objective(WIDTHS, seed)
    train(model, objective, loader, steps, Hyperparameters(accumulate=accumulate), progress=False)
    space = sk.SubmodelSpace(width=WIDTHS)
    results = sk.inference.evaluate(model, space, data.test_loader(), progress=False)
    return tuple(100 * row.metric for row in reversed(results.rows))


def main(given: list[str] | None = None) -> dict[str, dict[int, tuple[float, ...]]]:
    parser = argparse.ArgumentParser(description="SortedNet, Tables 5 and 6")
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--data", type=Path, help="CIFAR-10: its .tar.gz or its folder")
    parser.add_argument("--epochs", type=int, help="in place of the preset's")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the preset's")
    parser.add_argument(
        "--accumulate", type=int, nargs="+", choices=PAPER["5"], default=[*PAPER["5"]]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(given)
    preset, path = PRESETS[options.preset], options.data or Path("cifar-10-batches-py")
    data = (digit_images(8) if options.preset == "digits" else cifar10(path)).to(options.device)
    epochs, seeds = options.epochs or preset.epochs, options.seeds or preset.seeds
    batches = epochs * len(data.train_loader(preset.batch_size))
    found: dict[str, dict[int, tuple[float, ...]]] = {"5": {}, "6": {}}
    runs: dict[tuple[int, int], tuple[float, ...]] = {}  # both tables begin with the same run
    for table, caption in (("5", "as many steps"), ("6", "as many epochs")):
        print(f"\nTable {table}: {caption}; accuracy in %, mean of {len(seeds)} seeds (paper)")
        head = "".join(f"{100 * width // 16:>15}%" for width in reversed(WIDTHS))
        print(f"{'g_acc':>6}{'steps':>8}{'epochs':>8}{head}{'avg.':>9}")
        for accumulate in options.accumulate:
            steps = batches if table == "5" else max(1, batches // accumulate)
            if (steps, accumulate) not in runs:
                parts = [
                    accuracies(data, preset, steps, accumulate, seed, options.device)
                    for seed in seeds
                ]
                runs[steps, accumulate] = tuple(map(statistics.fmean, zip(*parts, strict=True)))
            row = found[table][accumulate] = runs[steps, accumulate]
            spent = epochs * accumulate if table == "5" else epochs
            pairs = zip(row, PAPER[table][accumulate], strict=True)
            cells = "".join(f"{ours:>8.2f} ({theirs:.2f})" for ours, theirs in pairs)
            print(f"{accumulate:>6}{steps:>8}{spent:>8}{cells}{statistics.fmean(row):>9.2f}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    main()
