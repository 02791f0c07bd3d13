"""CIFAR-10 from a local copy: 60,000 photographs of 32 x 32 pixels in ten classes.

Both forms in which it is distributed are read, as a folder or as its ``.tar.gz``: the Python
pickles (without executing them) and the binary files. Nothing is downloaded.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.data.augment import CropAndFlip
from sorted_kernels.data.images import Images
from sorted_kernels.data.inert_pickle import Made, load
from sorted_kernels.errors import DataError

SIDE, CHANNELS, CLASSES = 32, 3, 10
PIXELS = CHANNELS * SIDE * SIDE
ROWS = 10_000
"""Images in each file."""
# Mean and deviation of the 50,000 training images' channels, of values from 0 to 255.
MEAN = (125.307, 122.950, 113.865)
DEVIATION = (62.993, 62.089, 66.705)

_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = "test_batch"
_LARGEST = 64 * 2**20
"""More bytes than any of the files has."""

Read = Callable[[str], bytes | None]


def cifar10(path: str | os.PathLike[str]) -> Images:
    """Read CIFAR-10.

    Args:
        path: ``cifar-10-python.tar.gz`` or ``cifar-10-binary.tar.gz``, or the folder that either
            unpacks to (or one that contains it).

    Returns:
        50,000 training and 10,000 test images, uint8 as in the files; its loaders normalise them,
        and crop and flip those for training (4 pixels of padding).

    Raises:
        DataError: There is no such file; or one is missing, truncated or of another form, a pickle
            holds anything but plain data, or a label is not in 0..9.
    """
    source = Path(path)
    if source.is_dir():
        parts = _read_all(_folder(source), str(source))
    elif source.is_file():
        parts = _read_archive(source)
    else:
        raise DataError(
            f"{str(source)!r} is neither a file nor a folder; give cifar-10-python.tar.gz, "
            "cifar-10-binary.tar.gz, or the folder that either unpacks to"
        )
    pictures, labels = zip(*parts, strict=True)
    return Images(
        train_inputs=torch.cat(pictures[:-1]),
        train_targets=torch.cat(labels[:-1]),
        test_inputs=pictures[-1],
        test_targets=labels[-1],
        mean=MEAN,
        deviation=DEVIATION,
        augment=CropAndFlip(padding=4),
    )


def _folder(root: Path) -> Read:
    """Reads a file of the folder, or of the folder in it that the archive would have made."""
    places = [root, root / "cifar-10-batches-py", root / "cifar-10-batches-bin"]

    def read(name: str) -> bytes | None:
        for place in places:
            if (place / name).is_file():
                try:
                    with open(place / name, "rb") as file:
                        return file.read(_LARGEST)
                except OSError as error:
                    raise DataError(
                        f"{str(place / name)!r} cannot be read: {error.strerror}"
                    ) from error
        return None

    return read


def _read_archive(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Read the members in memory: nothing is unpacked, so no member's path matters."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    found[PurePosixPath(member.name).name] = file.read(_LARGEST)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{str(path)!r} is no whole tar archive: {error}") from error
    return _read_all(found.get, str(path))


def _read_all(read: Read, source: str) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of the five training files and the test file."""
    parts = []
    for name in (*_TRAIN, _TEST):
        content = read(name)
        parse = _parse_pickle
        if content is None:
            content, parse = read(f"{name}.bin"), _parse_binary
        if content is None:
            raise DataError(f"{source!r} has neither {name} nor {name}.bin; CIFAR-10 has one")
        try:
            pictures, labels = parse(content)
        except ValueError as error:
            raise DataError(f"{name} of {source!r} is damaged or foreign: {error}") from error
        if labels.min() < 0 or labels.max() >= CLASSES:
            wrong = labels[(labels < 0) | (labels >= CLASSES)][0]
            raise DataError(f"{name} of {source!r} has label {wrong}; allowed are 0..{CLASSES - 1}")
        parts.append((pictures, labels))
    return parts


def _parse_binary(content: bytes) -> tuple[Tensor, Tensor]:
    """Records of one byte for the label and one a pixel, colour planes one after the other."""
    _check_size(len(content), ROWS * (1 + PIXELS))
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(ROWS, 1 + PIXELS)
    pictures = records[:, 1:].reshape(ROWS, CHANNELS, SIDE, SIDE)
    return pictures, records[:, 0].long()


def _parse_pickle(content: bytes) -> tuple[Tensor, Tensor]:
    """A dictionary with ``labels``, a list, and ``data``, a uint8 array (images, pixels)."""
    batch = load(content)
    if not isinstance(batch, dict):
        raise ValueError(f"it holds a {type(batch).__name__}; allowed is a dictionary")
    labels, data = (_entry(batch, name) for name in ("labels", "data"))
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError("its 'labels' are no list of integers")
    if len(labels) != ROWS:
        raise ValueError(f"it has {len(labels)} labels; allowed are {ROWS}")
    pixels = _array_bytes(data)
    _check_size(len(pixels), ROWS * PIXELS)
    flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    return flat.view(ROWS, CHANNELS, SIDE, SIDE), torch.tensor(labels)


def _entry(batch: dict[Any, Any], name: str) -> Any:
    for key in (name.encode(), name):  # written by Python 2, and by Python 3
        if key in batch:
            return batch[key]
    raise ValueError(f"it has no entry {name!r}")


def _array_bytes(array: Any) -> bytes:
    """The bytes of a uint8 array in C order, from the state that NumPy gives its pickles."""
    if not isinstance(array, Made) or not isinstance(array.state, tuple):
        raise ValueError("its 'data' is no array")
    _version, shape, kind, fortran, content = array.state
    letters = kind.arguments[0] if isinstance(kind, Made) else None
    if letters not in (b"u1", "u1") or fortran or not isinstance(content, bytes):
        raise ValueError("its 'data' is no uint8 array in C order")
    if shape != (ROWS, PIXELS):
        raise ValueError(f"its 'data' has shape {shape}; allowed is {(ROWS, PIXELS)}")
    return content


def _check_size(size: int, expected: int) -> None:
    if size != expected:
        raise ValueError(f"it has {size} bytes of data; allowed are {expected}")
