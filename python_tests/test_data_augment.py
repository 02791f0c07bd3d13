"""Random crops and flips, digits as images, and their exact repetition."""

import pytest
import torch

from sorted_kernels.data import CropAndFlip, digit_images
from sorted_kernels.errors import OptionError
from sorted_kernels.training.cursor import Cursor


def naive(image, down, right, mirrored, padding):
    """One image, pixel by pixel: what lies ``down - padding`` below and so on, zero outside."""
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            source_row = row + down - padding
            source_column = (width - 1 - column if mirrored else column) + right - padding
            if 0 <= source_row < height and 0 <= source_column < width:
                result[:, row, column] = image[:, source_row, source_column]
    return result


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_and_flip(padding, flip, dtype):
    images = torch.randint(1, 200, (40, 2, 5, 6)).to(dtype)
    before = images.clone()
    moved = CropAndFlip(padding, flip)(images, torch.Generator().manual_seed(1))
    assert torch.equal(images, before)
    assert moved.dtype == dtype
    assert moved.shape == images.shape
    span = range(2 * padding + 1)
    seen = set()
    for image, result in zip(images, moved, strict=True):
        kinds = [
            (down, right, mirrored)
            for down in span
            for right in span
            for mirrored in ([False, True] if flip else [False])
            if torch.equal(naive(image, down, right, mirrored, padding), result)
        ]
        assert kinds, "an image is no shift of itself"
        seen.add(kinds[0])
    assert len(seen) >= min(10, len(span) ** 2)
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


def test_drawn_from_its_generator_alone():
    images = torch.rand(8, 1, 8, 8)
    torch.manual_seed(1)
    one = CropAndFlip()(images, torch.Generator().manual_seed(5))
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    two = CropAndFlip()(images, torch.Generator().manual_seed(5))
    assert torch.equal(one, two)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_padding_below_zero():
    with pytest.raises(OptionError, match="padding is -1"):
        CropAndFlip(padding=-1)


@pytest.mark.parametrize("side", [8, 16, 32])
def test_digit_images(side):
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    data = digit_images(side)
    assert data.shape == (1, side, side)
    assert data.train_inputs.shape[0] == 1347
    assert data.train_inputs.min() == 0
    x = torch.cat([inputs for inputs, _ in data.train_loader(1347, augment=False)])
    assert x.mean().abs() < 1e-4
    assert (x.std() - 1).abs() < 1e-4
    if side == 8:
        raw = torch.from_numpy(load_digits().images).float()
        scale = data.train_inputs.max() / 16
        ours = torch.cat([data.train_inputs, data.test_inputs]).view(-1, 64) / scale
        assert torch.equal(ours.round().sort(dim=0).values, raw.view(-1, 64).sort(dim=0).values)


def test_a_loader_goes_on_where_it_was():
    pytest.importorskip("sklearn")
    whole = Cursor(digit_images(8).train_loader(64, seed=3))
    expected = [whole.take() for _ in range(50)]
    begun = Cursor(digit_images(8).train_loader(64, seed=3))
    for _ in range(30):
        begun.take()
    later = Cursor(digit_images(8).train_loader(64, seed=99))
    later.load_state_dict(begun.state_dict())
    for (x, y), (want_x, want_y) in zip(
        (later.take() for _ in range(20)), expected[30:], strict=True
    ):
        assert torch.equal(x, want_x)
        assert torch.equal(y, want_y)


def test_augmented_training_images_differ_each_epoch_and_test_images_do_not():
    pytest.importorskip("sklearn")
    data = digit_images(16)
    loader = data.train_loader(128, seed=1)
    first, second = (torch.cat([x for x, _ in loader]) for _ in range(2))
    assert len(first) == 1280
    assert not torch.equal(first.sum((1, 2, 3)).sort().values, second.sum((1, 2, 3)).sort().values)
    tests = [torch.cat([x for x, _ in data.test_loader(100)]) for _ in range(2)]
    assert torch.equal(*tests)


@pytest.mark.parametrize("side", [0, 7, 12, 8.0, True])
def test_bad_side(side):
    with pytest.raises(OptionError, match="side is"):
        digit_images(side)
