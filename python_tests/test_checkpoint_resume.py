from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sorted_kernels import SubmodelSpace
from sorted_kernels.data import Batches
from sorted_kernels.optim import SGD, AdamW
from sorted_kernels.training import (
    Sandwich,
    Stochastic,
    StochasticSummation,
    cosine,
    fit,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from support.training import Net, assert_same_weights, random_data, weights_of

pytest.importorskip("safetensors")
SPACE = SubmodelSpace(width=[3, 8, 16], depth=[1, 2, 3])
DATA = random_data(50)
TOTAL = 12


def noise(inputs, generator):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


LOADERS = {
    "batches": lambda seed: Batches(*DATA, 8, seed=seed, transform=noise),
    "dataloader": lambda seed: DataLoader(
        TensorDataset(*DATA), 8, shuffle=True, generator=torch.Generator().manual_seed(seed)
    ),
    "dataloader-global": lambda seed: DataLoader(TensorDataset(*DATA), 8, shuffle=True),
}
OBJECTIVES = {"stochastic": Stochastic, "summation": StochasticSummation, "sandwich": Sandwich}
OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, lr=0.01),
    "adamw-whole": lambda p: AdamW(p, lr=0.01, update="whole"),
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "torch-adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def evaluate(model, step):
    model.train()  # dropout draws: the random state must be put back after it
    with torch.no_grad():
        return {"mean": model(DATA[0]).mean()}


def train(directory, steps, seed, loader, objective, optimizer):
    """Train up to ``steps``; everything that a resumed run must restore starts from ``seed``."""
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    model = Net(dropout=0.2, seed=seed)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    history = fit(
        model,
        OBJECTIVES[objective](SPACE, seed=seed),
        LOADERS[loader](seed),
        optimizer,
        steps=steps,
        accumulate=3,
        scheduler=cosine(optimizer, TOTAL, warmup=2),
        max_grad_norm=1.0,
        evaluate=evaluate,
        evaluate_every=1,
        checkpoint_dir=directory,
        progress=False,
    )
    randomness = torch.rand(2).tolist(), np.random.rand(), random.random()
    return weights_of(model), history, optimizer.state_dict(), randomness


@pytest.mark.parametrize(
    ("loader", "objective", "optimizer"),
    [
        ("batches", "stochastic", "adamw"),
        ("dataloader", "stochastic", "sgd"),
        ("dataloader-global", "summation", "torch-adamw"),
        ("batches", "sandwich", "adamw-whole"),
    ],
)
def test_resumed_training_is_bitwise_the_uninterrupted_one(loader, objective, optimizer, tmp_path):
    setup = {"loader": loader, "objective": objective, "optimizer": optimizer}
    straight = train(tmp_path / "straight", TOTAL, 1, **setup)
    for seed, steps in enumerate((1, 5, 7, TOTAL), start=1):  # 7 batches an epoch, windows of 3
        resumed = train(tmp_path / "resumed", steps, seed, **setup)
    assert_same_weights(resumed[0], straight[0])
    assert resumed[1] == straight[1]
    assert str(resumed[2]) == str(straight[2])
    assert resumed[3] == straight[3]


SCRIPT = Path(__file__).parent / "support" / "train_until_killed.py"
STEPS = 160


def start(directory):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(directory), str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_training_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    straight = start(tmp_path / "straight").communicate()[0].splitlines()[-1]
    dice, directory, reached = random.Random(0), tmp_path / "killed", 0
    for _ in range(4):
        process = start(directory)
        for _ in range(dice.randint(1, 12)):
            reached = int(process.stdout.readline().split()[1])
        with contextlib.suppress(subprocess.TimeoutExpired):  # a little later: any moment of a step
            process.wait(timeout=dice.uniform(0.0, 0.02))
        process.kill()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        latest = latest_checkpoint(directory)
        assert load_checkpoint(latest, model=Net()).step >= reached - 1
    assert reached < STEPS
    resumed = start(directory).communicate()[0].splitlines()
    assert resumed[-1].startswith("weights ")
    assert len(resumed) <= STEPS - reached + 2
    assert resumed[-1] == straight


def in_killed_child(body, moment):
    """Run ``body`` in a fork that dies by SIGKILL before its ``moment``-th change of the disk.

    Returns:
        Whether it died; False when the body was over before that moment.
    """
    child = os.fork()
    if child == 0:
        left = moment

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("mkdir", "rename", "fsync", "rmdir", "unlink", "open", "close"):
            setattr(os, name, deadly(getattr(os, name)))
        import safetensors.torch

        safetensors.torch.save_file = deadly(safetensors.torch.save_file)
        Path.write_text = deadly(Path.write_text)
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert not (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1), "the body itself failed"
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_of_writing_leaves_a_readable_latest_checkpoint(tmp_path):
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads that are not there
    moment, seen = 0, set()
    while True:
        moment += 1
        directory = tmp_path / str(moment)
        for step in (1, 2):
            save_checkpoint(directory, step, model=Net(seed=step), keep=2)
        died = in_killed_child(
            lambda d=directory: save_checkpoint(d, 3, model=Net(seed=3), keep=1), moment
        )
        model = Net()
        step = load_checkpoint(directory, model=model).step
        seen.add(step)
        assert_same_weights(weights_of(model), weights_of(Net(seed=step)))
        for path in directory.glob("step-*"):  # the older ones too are whole or gone
            load_checkpoint(path, model=model)
        save_checkpoint(directory, 4, model=Net(), keep=1)  # sweeps up what the kill left
        assert [path.name for path in directory.iterdir()] == ["step-000004"]
        if not died:
            break
    assert moment > 15
    assert seen == {2, 3}
