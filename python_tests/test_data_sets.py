from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sorted_kernels.data import blobs, digits
from sorted_kernels.data.digits import jitter_images
from sorted_kernels.errors import OptionError

pytest.importorskip("sklearn")


def test_digits_are_split_once_each_and_in_proportion():
    data = digits()
    assert data.train_inputs.shape == (1347, 64)
    assert data.test_inputs.shape == (450, 64)
    assert data.train_inputs.dtype == data.test_inputs.dtype == torch.float32
    assert data.train_targets.dtype == data.test_targets.dtype == torch.int64
    everything = torch.bincount(torch.cat([data.train_targets, data.test_targets]))
    share = torch.bincount(data.test_targets) / everything
    assert ((share - 0.25).abs() < 0.005).all()


def test_no_row_is_in_both_parts():
    from sklearn.datasets import load_digits

    data = digits()
    merged = torch.cat([data.train_inputs, data.test_inputs])
    raw = torch.from_numpy(load_digits().data).float()
    scale = (data.train_inputs.max() - data.background) / 16
    restored = (merged - data.background) / scale
    assert torch.equal(
        restored.round().sort(dim=0).values, raw.sort(dim=0).values
    )  # the same multiset, column by column


def test_digits_are_standardised_by_training_rows_alone():
    data = digits(seed=3)
    assert data.train_inputs.mean().abs() < 1e-5
    assert (data.train_inputs.std(correction=0) - 1).abs() < 1e-5
    assert data.test_inputs.mean() != 0
    assert data.test_inputs.min() == pytest.approx(data.background)


def test_split_follows_its_seed():
    assert torch.equal(digits(seed=1).test_inputs, digits(seed=1).test_inputs)
    assert not torch.equal(digits(seed=1).test_inputs, digits(seed=2).test_inputs)
    assert len(digits(test_fraction=0.1).test_targets) == 180


def test_loaders():
    data = digits()
    assert torch.equal(torch.cat([x for x, _ in data.test_loader(100)]), data.test_inputs)
    plain = torch.cat([y for _, y in data.train_loader(64, augment=False)])
    assert len(plain) == 1347
    assert not torch.equal(plain, data.train_targets)
    augmented, _ = next(iter(data.train_loader(64, seed=1)))
    original, _ = next(iter(data.train_loader(64, augment=False, seed=1)))
    assert augmented.shape == original.shape
    correlation = torch.corrcoef(torch.stack([augmented.flatten(), original.flatten()]))[0, 1]
    assert 0.6 < correlation < 0.99


def test_jitter_keeps_background_and_is_small():
    background = -0.75
    images = torch.full((200, 8, 8), background)
    images[:, 3:5, 3:5] = 2.0  # a square in the middle: its centre of mass shows the move
    moved = jitter_images(images.view(200, 64), torch.Generator().manual_seed(0), background)
    mass = moved.view(200, 8, 8) - background
    assert (mass[:, 0] == 0).all()
    assert (mass > -1e-5).all()
    grid = torch.arange(8.0) - 3.5
    for axis in (1, 2):
        centre = (mass.sum(dim=axis) * grid).sum(dim=1) / mass.sum(dim=(1, 2))
        assert centre.abs().max() < 0.9
        assert centre.std() > 0.2
        assert centre.mean().abs() < 0.15


def test_blobs():
    inputs, targets = blobs()
    assert inputs.shape == (1000, 2)
    assert inputs.dtype == torch.float32
    assert torch.bincount(targets).tolist() == [250] * 4
    for label, (centre, deviation) in enumerate(
        [((-2, 0), 0.5), ((0, 2), 1.0), ((2, 0), 0.5), ((0, -2), 1.0)]
    ):
        points = inputs[targets == label]
        assert torch.allclose(points.mean(dim=0), torch.tensor(centre).float(), atol=0.25)
        assert torch.allclose(points.std(dim=0), torch.tensor(deviation), rtol=0.15)
    assert torch.equal(blobs()[0], inputs)
    assert not torch.equal(blobs(seed=43)[0], inputs)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2])
def test_bad_fraction(fraction):
    with pytest.raises(OptionError, match="test_fraction"):
        digits(test_fraction=fraction)


def test_too_few_points():
    with pytest.raises(OptionError, match="points is 3"):
        blobs(3)


def test_optional_packages_are_imported_where_used_only():
    code = (
        "import sys, sorted_kernels.training, sorted_kernels.data\n"
        "print([m for m in ('rich', 'safetensors', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
