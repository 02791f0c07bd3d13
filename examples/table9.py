"""SortedNet's Table 9: does training by the stochastic loss put the neurons in order?

One hidden layer of 10 neurons classifies points from four Gaussian blobs. It is trained plainly and
as a sorted network (a width drawn anew each batch); then the first k neurons are kept, and the last
k, and the others set to zero. Adam 0.01, batch 16, 10 epochs, 5 seeds, as in the paper.

The paper does not say on which points it judges: here they are the 1,000 that it trains on. Nor
does it name the activation: ReLU here.

    python examples/table9.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import sorted_kernels as sk
from sorted_kernels.data import Batches, blobs

NEURONS, SEEDS, EPOCHS = 10, 5, 10
# Means and deviations as printed in the paper (arXiv:2309.00255v3, Table 9), k = 9..1.
PAPER = {
    ("target", "plain"): [93.86, 93.70, 93.10, 92.34, 90.38, 86.84, 80.14, 60.96, 48.66],
    ("target", "sorted"): [93.64, 93.78, 93.62, 93.70, 93.86, 93.66, 93.14, 85.26, 62.58],
    ("reverse", "plain"): [94.04, 93.84, 93.52, 92.94, 90.92, 86.70, 90.82, 85.52, 51.70],
    ("reverse", "sorted"): [82.20, 82.06, 72.14, 65.52, 66.06, 59.88, 41.52, 35.18, 29.84],
}


def train(space: sk.SubmodelSpace, inputs: Tensor, targets: Tensor, seed: int) -> torch.nn.Module:
    """A network trained on a space of widths."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, NEURONS), torch.nn.ReLU(), torch.nn.Linear(NEURONS, 4)
    )
    sk.elasticize(model, {"0": {"out": "width"}, "2": {"in": "width"}})
    sk.training.fit(
        model,
        sk.training.Stochastic(space, seed=seed),
        Batches(inputs, targets, 16, seed=seed),
        sk.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0),
        epochs=EPOCHS,
        progress=False,
    )
    return model


def accuracy(model: torch.nn.Module, keep: slice, inputs: Tensor, targets: Tensor) -> float:
    """Percent right with some neurons kept and the others zero."""
    hidden, head = model[0], model[2]
    with torch.no_grad():
        neurons = F.relu(F.linear(inputs, hidden.weight, hidden.bias))
        mask = torch.zeros(NEURONS)
        mask[keep] = 1.0
        logits = F.linear(neurons * mask, head.weight, head.bias)
    return 100.0 * (logits.argmax(-1) == targets).float().mean().item()


def measure() -> dict[tuple[str, str], Tensor]:
    """Accuracy (seed, k = 10..1) of each order and training."""
    inputs, targets = blobs()
    spaces = {
        "plain": sk.SubmodelSpace(width=[NEURONS]),
        "sorted": sk.SubmodelSpace(width=range(1, NEURONS + 1)),
    }
    counts = range(NEURONS, 0, -1)
    table: dict[tuple[str, str], Tensor] = {}
    for name, space in spaces.items():
        models = [train(space, inputs, targets, seed) for seed in range(SEEDS)]
        for order in ("target", "reverse"):
            rows = [
                [
                    accuracy(
                        model,
                        slice(0, k) if order == "target" else slice(NEURONS - k, None),
                        inputs,
                        targets,
                    )
                    for k in counts
                ]
                for model in models
            ]
            table[order, name] = torch.tensor(rows)
    return table


def main() -> None:
    torch.set_num_threads(1)  # ten neurons are not worth a second thread
    table = measure()
    for order, kept in (("target", "first"), ("reverse", "last")):
        print(
            f"\n{order} order: the {kept} k of {NEURONS} neurons kept, accuracy in %, {SEEDS} seeds"
        )
        print(f"{'k':>5}{'plain':>16}{'paper':>8}{'sorted':>17}{'paper':>8}")
        for column in range(1, NEURONS):
            cells = [f"{NEURONS - column:5d}"]
            for name in ("plain", "sorted"):
                values = table[order, name][:, column]
                cells.append(f"{values.mean():9.2f} +-{values.std():5.2f}")
                cells.append(f"{PAPER[order, name][column - 1]:7.2f}")
            print(" ".join(cells))
        means = [
            f"{table[order, name][:, 1:].mean():.2f} (paper {sum(PAPER[order, name]) / 9:.2f})"
            for name in ("plain", "sorted")
        ]
        print(f"  mean of k = 9..1: plain {means[0]}, sorted {means[1]}")


if __name__ == "__main__":
    main()
