from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler

from sorted_kernels.data import Batches
from sorted_kernels.errors import CheckpointError
from sorted_kernels.training import random_state
from sorted_kernels.training.cursor import Cursor, generators_of

ROWS = 11


class Noisy(Dataset):
    """Rows that the global generators change each time they are read."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        noise = float(torch.rand(())) + np.random.rand() + random.random()
        return torch.tensor([index, noise], dtype=torch.float64)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def noise(inputs, source):
    return inputs + torch.rand(inputs.shape, generator=source)


def weighted(seed):
    return WeightedRandomSampler([1.0] * ROWS, ROWS, generator=generator(seed))


rows = torch.arange(float(ROWS))
LOADERS = {
    "batches": lambda seed: Batches(rows, rows, 3, seed=seed),
    "batches-augmented": lambda seed: Batches(rows, rows, 3, seed=seed, transform=noise),
    "global": lambda seed: DataLoader(Noisy(), 3, shuffle=True),
    "own-generator": lambda seed: DataLoader(Noisy(), 3, shuffle=True, generator=generator(seed)),
    "sampler-generator": lambda seed: DataLoader(
        Noisy(), 3, sampler=RandomSampler(rows, generator=generator(seed))
    ),
    "replacement": lambda seed: DataLoader(
        Noisy(), 3, sampler=RandomSampler(rows, replacement=True, generator=generator(seed))
    ),
    "weighted": lambda seed: DataLoader(Noisy(), 3, sampler=weighted(seed)),
    "worker": lambda seed: DataLoader(
        rows, 3, shuffle=True, generator=generator(seed), num_workers=1
    ),
    "in-order": lambda seed: DataLoader(Noisy(), 3),
}


def seed_all(seed):
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)


def take(cursor, count):
    """Batches, with a draw of the model's own (dropout, say) after each."""
    return [(cursor.take(), torch.rand(2), np.random.rand()) for _ in range(count)]


def flat(taken):
    return [
        [part.tolist() for part in (batch if isinstance(batch, (list, tuple)) else [batch])]
        + [draw.tolist(), other]
        for batch, draw, other in taken
    ]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("used", [1, 4, 6], ids=["first-batch", "epoch-end", "second-epoch"])
def test_data_and_global_randomness_go_on_exactly(name, used):
    seed_all(3)
    cursor = Cursor(LOADERS[name](1))
    take(cursor, used)
    state, randomness = cursor.state_dict(), random_state.snapshot()
    rest = flat(take(cursor, 9))  # into the third epoch

    seed_all(77)
    resumed = Cursor(LOADERS[name](99))
    resumed.load_state_dict(state)
    random_state.restore(randomness)
    assert (resumed.epoch, resumed.position) == ((used - 1) // 4, (used - 1) % 4 + 1)
    assert flat(take(resumed, 9)) == rest
    assert resumed.epoch == cursor.epoch


@pytest.mark.parametrize("name", ["batches", "own-generator", "global"])
def test_every_epoch_has_each_row_once_in_a_new_order(name):
    seed_all(0)
    cursor = Cursor(LOADERS[name](1))
    epochs = []
    for _ in range(3):
        batches = [cursor.take() for _ in range(4)]
        firsts = [b[0] if isinstance(b, tuple) else b[:, 0] for b in batches]
        epochs.append(torch.cat(firsts).tolist())
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_draw_of_others_from_the_loaders_generator_is_replayed():
    loader = LOADERS["batches"](1)
    cursor = Cursor(loader)
    take(cursor, 2)
    torch.rand(1, generator=loader.generator)  # an evaluation that reads the training loader, say
    state = cursor.state_dict()
    rest = [cursor.take()[0].tolist() for _ in range(8)]
    resumed = Cursor(LOADERS["batches"](5))
    resumed.load_state_dict(state)
    assert [resumed.take()[0].tolist() for _ in range(8)] == rest


def test_set_epoch_of_a_sampler_is_called():
    class Sampler:
        epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    class Loader(list):
        sampler = Sampler()

    cursor = Cursor(Loader([1, 2]))
    assert [cursor.take() for _ in range(5)] == [1, 2, 1, 2, 1]
    assert Sampler.epochs == [0, 1, 2]


def test_generators_are_found_once():
    own = generator(0)
    assert generators_of(DataLoader(rows, shuffle=True, generator=own)) == [own]
    assert generators_of([1, 2]) == []


def test_another_loader_is_an_error():
    cursor = Cursor(LOADERS["batches"](1))
    take(cursor, 3)
    with pytest.raises(CheckpointError, match="0 generators of its own, the checkpoint's had 1"):
        Cursor([1, 2, 3]).load_state_dict(cursor.state_dict())
    with pytest.raises(CheckpointError, match="ends after 1 batches"):
        Cursor(Batches(rows, rows, 20)).load_state_dict(cursor.state_dict())


def test_snapshot_restores_every_global_generator():
    def draw():
        return torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)

    seed_all(1)
    draw()  # leaves NumPy's and Python's cached second Gaussian behind
    state = random_state.snapshot()
    expected = [draw() for _ in range(3)]
    seed_all(2)
    random_state.restore(state)
    assert [draw() for _ in range(3)] == expected
