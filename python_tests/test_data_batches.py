from __future__ import annotations

import pytest
import torch

from sorted_kernels.data import Batches
from sorted_kernels.errors import OptionError, ShapeError

INPUTS = torch.arange(20.0).view(10, 2)
TARGETS = torch.arange(10)


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [(3, False, [3, 3, 3, 1]), (3, True, [3, 3, 3]), (5, False, [5, 5]), (1, False, [1] * 10)]
    + [(99, False, [10])],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_lengths_and_rows(batch_size, drop_last, sizes, shuffle):
    loader = Batches(INPUTS, TARGETS, batch_size, shuffle=shuffle, drop_last=drop_last)
    batches = list(loader)
    assert len(loader) == len(batches)
    assert [len(inputs) for inputs, _ in batches] == sizes
    rows = torch.cat([targets for _, targets in batches])
    assert len(set(rows.tolist())) == sum(sizes)
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), INPUTS[rows])
    if not shuffle:
        assert rows.tolist() == list(range(sum(sizes)))


def test_order_is_new_each_epoch_and_the_seeds():
    def epochs(seed):
        loader = Batches(INPUTS, TARGETS, 4, seed=seed)
        return [torch.cat([t for _, t in loader]).tolist() for _ in range(3)]

    first = epochs(1)
    assert first[0] != first[1] != first[2]
    assert epochs(1) == first
    assert epochs(2) != first


def test_transform_draws_from_the_loaders_generator():
    def transform(inputs, generator):
        return inputs + torch.rand(len(inputs), 1, generator=generator)

    def run(seed):
        loader = Batches(INPUTS, TARGETS, 4, seed=seed, transform=transform)
        return [torch.cat([i for i, _ in loader]) for _ in range(2)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = run(1)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first[0].sort(dim=0).values, first[1].sort(dim=0).values)
    assert all(torch.equal(a, b) for a, b in zip(first, run(1), strict=True))
    assert torch.equal(INPUTS, torch.arange(20.0).view(10, 2))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ShapeError, "equal lengths", (INPUTS, TARGETS[:3], 2)),
        (ShapeError, "at least 1", (INPUTS[:0], TARGETS[:0], 2)),
        (ShapeError, "equal lengths", (torch.tensor(1.0), torch.tensor(1), 2)),
        (OptionError, "batch_size is 0", (INPUTS, TARGETS, 0)),
        (OptionError, "batch_size is 2.0", (INPUTS, TARGETS, 2.0)),
        (OptionError, "at most the 10 rows", (INPUTS, TARGETS, 11, True, 0, True)),
    ],
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        Batches(*arguments)
