"""CIFAR-10's files in both forms, and what is refused."""

import os
import pickle

import numpy as np
import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.data import cifar, cifar10
from sorted_kernels.data.inert_pickle import load
from support import cifar_files

ROWS = 7
KINDS = ["python", "binary"]


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(cifar, "ROWS", ROWS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["folder", "folder above", "archive"])
def test_pixels_and_labels_arrive(tmp_path, kind, form):
    contents = cifar_files.files(kind, ROWS)
    if form == "archive":
        path = cifar_files.write_archive(tmp_path / "c.tar.gz", contents)
    else:
        inner = "cifar-10-batches-py" if kind == "python" else "cifar-10-batches-bin"
        root = tmp_path / inner if form == "folder above" else tmp_path
        cifar_files.write_folder(root, contents)
        path = tmp_path
    data = cifar10(path)
    assert data.train_inputs.shape == (5 * ROWS, 3, 32, 32)
    assert data.train_inputs.dtype == torch.uint8
    assert data.shape == (3, 32, 32)
    for seed in range(6):
        pixels, labels = cifar_files.pictures(ROWS, seed)
        rows = slice(seed * ROWS, (seed + 1) * ROWS)
        got = data.train_inputs[rows] if seed < 5 else data.test_inputs
        classes = data.train_targets[rows] if seed < 5 else data.test_targets
        assert torch.equal(got, torch.from_numpy(pixels).view(ROWS, 3, 32, 32))
        assert torch.equal(classes, torch.from_numpy(labels).long())


def test_standardised_by_the_fixed_numbers(tmp_path):
    data = cifar10(cifar_files.write_folder(tmp_path, cifar_files.files("binary", ROWS)))
    ((inputs, targets),) = data.test_loader(ROWS)
    assert torch.equal(targets, data.test_targets)
    expected = (data.test_inputs.double() - torch.tensor(cifar.MEAN).view(3, 1, 1).double()) / (
        torch.tensor(cifar.DEVIATION).view(3, 1, 1).double()
    )
    torch.testing.assert_close(inputs.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_fake_pickle_is_what_pickle_reads():
    """The fixture is a real pickle: Python's own reader gives the same as ours."""
    pixels, labels = cifar_files.pictures(ROWS, 3)
    content = cifar_files.pickled(pixels, labels)
    real = pickle.loads(content, encoding="bytes")
    assert np.array_equal(real[b"data"], pixels)
    ours = load(content)
    assert ours[b"labels"] == real[b"labels"] == labels.tolist()
    assert ours[b"filenames"] == real[b"filenames"]
    assert ours[b"data"].state[4] == pixels.tobytes()


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickles_that_python_3_wrote_again(tmp_path, protocol):
    contents = {}
    for seed, name in enumerate(cifar_files.NAMES):
        pixels, labels = cifar_files.pictures(ROWS, seed)
        batch = {"labels": labels.tolist(), "data": pixels}
        contents[name] = pickle.dumps(batch, protocol)
    data = cifar10(cifar_files.write_folder(tmp_path, contents))
    assert torch.equal(
        data.test_inputs.view(ROWS, -1), torch.from_numpy(cifar_files.pictures(ROWS, 5)[0])
    )


class _Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_runs_nothing(tmp_path, protocol):
    target = str(tmp_path / "made_by_the_pickle")
    contents = cifar_files.files("python", ROWS)
    contents["data_batch_3"] = pickle.dumps({"labels": _Malicious(target)}, protocol)
    with pytest.raises(sk.DataError, match="data_batch_3"):
        cifar10(cifar_files.write_folder(tmp_path / "c", contents))
    assert not os.path.exists(target)
    pickle.loads(contents["data_batch_3"])  # and it would have
    assert os.path.exists(target)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x02cos\nsystem\n.", "names 'os.system'"),
        (b"\x80\x02cbuiltins\neval\n.", "names 'builtins.eval'"),
        (b"\x80\x02cnumpy\nload\n.", "names 'numpy.load'"),
        (b"\x80\x04\x8c\x05numpy\x8c\x05ndarr\x93.", "names 'numpy.ndarr'"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"\x80\x02(inumpy\nndarray\n.", "INST"),
        (b"\x80\x02}K\x01\x85R.", "no name of an array constructor"),
        (b"\x80\x02}]b.", "gives a state to a dict"),
        (b"\x80\x02Pname\n.", "PERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02}K\x01K\x02u.", "malformed|mark"),
        (b"\x80\x02h\x05.", "malformed"),
        (b"\x80\x02\x85.", "malformed"),
        (b"\x80\x02}", "ended|exhausted|STOP"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "expected"),
        (b"", "ended|exhausted|STOP|empty"),
        (b"not a pickle at all", "."),
    ],
)  # fmt: skip
def test_what_is_no_plain_data_is_refused(content, reason):
    with pytest.raises(ValueError, match=reason):
        load(content)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_truncated_file(tmp_path, kind, part):
    contents = cifar_files.files(kind, ROWS)
    name = next(name for name in contents if "4" in name)
    contents[name] = contents[name][: int(part * len(contents[name]))]
    with pytest.raises(sk.DataError, match="data_batch_4"):
        cifar10(cifar_files.write_folder(tmp_path, contents))


def test_a_record_too_few_is_not_taken_for_whole(tmp_path):
    contents = cifar_files.files("binary", ROWS)
    contents["test_batch.bin"] = contents["test_batch.bin"][:-3073]
    with pytest.raises(sk.DataError, match=f"test_batch.*{(ROWS - 1) * 3073}.*{ROWS * 3073}"):
        cifar10(cifar_files.write_folder(tmp_path, contents))


def test_truncated_archive(tmp_path):
    path = cifar_files.write_archive(tmp_path / "c.tar.gz", cifar_files.files("binary", ROWS))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(sk.DataError, match="no whole tar archive"):
        cifar10(path)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_file(tmp_path, kind):
    contents = cifar_files.files(kind, ROWS)
    del contents[next(name for name in contents if "5" in name)]
    with pytest.raises(sk.DataError, match="neither data_batch_5"):
        cifar10(cifar_files.write_folder(tmp_path, contents))


def test_missing_path(tmp_path):
    with pytest.raises(sk.DataError, match=r"cifar-10-python.tar.gz"):
        cifar10(tmp_path / "nowhere")


def test_foreign_archive(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"something else")
    with pytest.raises(sk.DataError, match="tar archive"):
        cifar10(tmp_path / "x.tar.gz")


@pytest.mark.parametrize("kind", KINDS)
def test_label_out_of_range(tmp_path, kind):
    pixels, labels = cifar_files.pictures(ROWS, 0)
    labels[3] = 10
    contents = cifar_files.files(kind, ROWS)
    name = next(iter(contents))
    write = cifar_files.pickled if kind == "python" else cifar_files.binary
    contents[name] = write(pixels, labels)
    with pytest.raises(sk.DataError, match="label 10"):
        cifar10(cifar_files.write_folder(tmp_path, contents))


def _entries(**changes):
    pixels, labels = cifar_files.pictures(ROWS, 0)
    return {"labels": labels.tolist(), "data": pixels, **changes}


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ([1, 2], "holds a list"),
        ({"labels": [1]}, "no entry 'data'|labels"),
        (_entries(labels=[1.5] * ROWS), "instruction BINFLOAT"),
        (_entries(labels=["1"] * ROWS), "no list of integers"),
        (_entries(labels=[1] * (ROWS + 1)), f"{ROWS + 1} labels"),
        (_entries(data=[1]), "no array"),
        (_entries(data=np.zeros((ROWS, 3072), np.int8)), "uint8"),
        (_entries(data=np.asfortranarray(np.zeros((ROWS, 3072), np.uint8))), "C order"),
        (_entries(data=np.zeros((ROWS, 3071), np.uint8)), "shape"),
    ],
)  # fmt: skip
def test_foreign_content(tmp_path, batch, reason):
    contents = cifar_files.files("python", ROWS)
    contents["data_batch_1"] = pickle.dumps(batch, 4)
    with pytest.raises(sk.DataError, match=reason):
        cifar10(cifar_files.write_folder(tmp_path, contents))
