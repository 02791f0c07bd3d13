"""A task of your own for the command line: your model, your data, your axes.

sorted-kernels train --task examples/own_task.py:wine --out runs/wine --epochs 60
sorted-kernels evaluate runs/wine
sorted-kernels select runs/wine --min-recovery 99
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split

import sorted_kernels as sk
from sorted_kernels.cli.tasks import Task
from sorted_kernels.data import Batches


class Classifier(torch.nn.Module):
    """13 measurements of a wine -> logits of its 3 growers; plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Linear(13, 64)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))
        self.head = torch.nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 13) -> (n, 3)."""
        x = self.stem(x).relu()
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


def wine() -> Task:
    """16 sub-models: 4 depths x 4 widths."""
    values, labels = load_wine(return_X_y=True)
    train, test = train_test_split(range(len(labels)), stratify=labels, random_state=0)
    values = (values - values[train].mean(0)) / values[train].std(0)
    x, y = torch.from_numpy(values).float(), torch.from_numpy(labels).long()

    model = Classifier()
    rules = {
        "stem": {"out": "width"},
        "layers": {"depth": "depth"},
        "layers.*": {"in": "width", "out": "width"},
        "head": {"in": "width"},
    }
    sk.elasticize(model, rules)
    return Task(
        model=model,
        space=sk.SubmodelSpace(depth=[1, 2, 3, 4], width=[8, 16, 32, 64]),
        train_loader=Batches(x[train], y[train], batch_size=16),
        test_loader=Batches(x[test], y[test], batch_size=64, shuffle=False),
        example=x[:2],
    )
