"""Tiny CIFAR-10 archives in both distributed forms, written instruction by instruction."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import numpy as np

NAMES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


def pictures(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels (rows, 3072) and labels (rows,)."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (rows, 3072), dtype=np.uint8)
    return pixels, generator.integers(0, 10, rows)


def short(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def pickled(pixels: np.ndarray, labels: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """A batch as Python 2's cPickle wrote it: protocol 2, with NumPy's names of the time."""
    rows, columns = shape or pixels.shape
    numbers = b"".join(b"K" + bytes([label]) for label in labels.tolist())
    content = pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85"
        + short(b"b")
        + b"\x87Rq\x09(K\x01M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns)
        + b"\x86cnumpy\ndtype\nq\x0a" + short(b"u1") + b"K\x00K\x01\x87Rq\x0b(K\x03" + short(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T" + struct.pack("<i", len(content)) + content + b"tb"
    )  # fmt: skip
    names = b"".join(short(b"picture.png") for _ in labels)
    return (
        b"\x80\x02}q\x01(" + short(b"batch_label") + b"q\x02" + short(b"training batch 1 of 5")
        + b"q\x03" + short(b"labels") + b"q\x04]q\x05(" + numbers + b"e"
        + short(b"data") + b"q\x06" + array
        + short(b"filenames") + b"q\x0c]q\x0d(" + names + b"eu."
    )  # fmt: skip


def binary(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1).tobytes()


def files(kind: str, rows: int) -> dict[str, bytes]:
    """Content of each file by its name; the file's place among them is the seed of its pixels."""
    write, suffix = {"python": (pickled, ""), "binary": (binary, ".bin")}[kind]
    return {name + suffix: write(*pictures(rows, seed)) for seed, name in enumerate(NAMES)}


def write_folder(root: Path, contents: dict[str, bytes]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return root


def write_archive(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
