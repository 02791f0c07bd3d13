"""Train a small network with a checkpoint every step; say each step aloud; print the weights' hash.

Usage: python train_until_killed.py CHECKPOINT_DIRECTORY STEPS
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from sorted_kernels import SubmodelSpace  # noqa: E402
from sorted_kernels.data import Batches  # noqa: E402
from sorted_kernels.optim import AdamW  # noqa: E402
from sorted_kernels.training import Stochastic, cosine, fit  # noqa: E402
from support.training import Net, random_data  # noqa: E402


def main(directory: str, steps: int) -> None:
    torch.set_num_threads(1)
    model = Net(dropout=0.2)
    optimizer = AdamW(model.parameters(), lr=0.01)
    fit(
        model,
        Stochastic(SubmodelSpace(width=[3, 8, 16], depth=[1, 2, 3])),
        Batches(*random_data(50), 8),
        optimizer,
        steps=steps,
        accumulate=2,
        scheduler=cosine(optimizer, steps, warmup=5),
        evaluate=lambda model, step: print(f"step {step}", flush=True) or {},
        evaluate_every=1,
        checkpoint_dir=directory,
        checkpoint_every=1,
        progress=False,
    )
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    print(f"weights {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
