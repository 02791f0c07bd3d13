from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sorted_kernels import SubmodelSpace
from sorted_kernels.errors import CheckpointError
from sorted_kernels.training import (
    Sandwich,
    Stochastic,
    cosine,
    latest_checkpoint,
    linear,
    load_checkpoint,
    save_checkpoint,
)
from sorted_kernels.training.serialize import Encoder, decode
from support.training import Net, assert_same_weights, random_data, weights_of

safetensors = pytest.importorskip("safetensors")
SPACE = SubmodelSpace(width=[3, 8, 16], depth=[1, 2, 3])


def trained(seed, steps=3, optimizer_class=torch.optim.AdamW):
    """Model, optimizer, scheduler and objective after a few steps."""
    model = Net(seed=seed)
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    scheduler, objective = cosine(optimizer, 20), Stochastic(SPACE, seed=seed)
    for _ in range(steps):
        objective(model, random_data(5))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "objective": objective,
    }


def flat_state(parts):
    """Everything of a training that can differ, in comparable form."""
    encoder = Encoder()
    encoded = {
        name: encoder.encode(part.state_dict(), name)
        for name, part in parts.items()
        if name != "model"
    }
    tensors = {name: tensor.tolist() for name, tensor in encoder.tensors.items()}
    return json.dumps([encoded, tensors])


# --- what a state may hold


def round_trip(value):
    encoder = Encoder()
    encoded = json.loads(json.dumps(encoder.encode(value, "top")))
    return decode(encoded, encoder.tensors)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        plain,
        lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple),
        max_leaves=12,
    )
)
def test_nested_values_come_back_as_they_were(value):
    back = round_trip(value)
    assert back == value
    assert repr(back) == repr(value)  # 1 and True, 1 and 1.0, list and tuple apart


def test_every_kind_of_tensor_is_written_and_read_bit_for_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    whole = torch.arange(24.0).view(4, 6)
    tensors = {
        "whole": whole,
        "again": whole,
        "transposed": whole.t(),
        "cut": whole[:2, :3],
        "row": whole[1],
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "also_empty": torch.empty(0),
        "bool": torch.tensor([True, False]),
        "bf16": torch.randn(5).bfloat16(),
        "half": torch.randn(5).half(),
        "double": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float64),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }
    encoder = Encoder()
    encoded = encoder.encode(tensors, "t")
    assert encoded["again"] == encoded["whole"]
    save_file(encoder.tensors, tmp_path / "file")
    back = decode(encoded, load_file(tmp_path / "file"))
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].nan_to_num(5.0), tensor.nan_to_num(5.0)), name


def test_what_a_checkpoint_cannot_hold(tmp_path):
    with pytest.raises(CheckpointError, match="extra/a/1 is a set"):
        save_checkpoint(tmp_path, 1, model=Net(), extra={"a": [0, {1, 2}]})
    assert list(tmp_path.iterdir()) == []


# --- writing


def test_everything_comes_back(tmp_path):
    written, read = trained(1), trained(2, steps=1)
    path = save_checkpoint(tmp_path, 3, extra={"note": (1, "a")}, **written)
    assert path.name == "step-000003"
    checkpoint = load_checkpoint(path, **read)
    assert checkpoint.step == 3
    assert checkpoint.extra == {"note": (1, "a")}
    assert_same_weights(weights_of(read["model"]), weights_of(written["model"]))
    assert flat_state(read) == flat_state(written)


def test_parts_may_be_left_out_when_reading(tmp_path):
    written, model = trained(1), Net(seed=4)
    save_checkpoint(tmp_path, 3, **written)
    load_checkpoint(tmp_path, model=model)
    assert_same_weights(weights_of(model), weights_of(written["model"]))


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    written, read = tied(), tied()
    path = save_checkpoint(tmp_path, 1, model=written)
    with safetensors.safe_open(path / "tensors.safetensors", "pt") as file:
        assert sum(key.startswith("model/") for key in file.keys()) == 3  # noqa: SIM118
    load_checkpoint(path, model=read)
    assert read[1].weight is read[0].weight
    assert_same_weights(weights_of(read), weights_of(written))


def test_old_ones_go_and_leftovers_are_swept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".tmp-step-000009").mkdir()
    (tmp_path / ".tmp-step-000009" / "tensors.safetensors").write_text("half")
    for step in (1, 2, 10, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, model=Net(), keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", "step-1000000", "step-999999"]
    assert latest_checkpoint(tmp_path).name == "step-1000000"


def test_latest_of_nothing(tmp_path):
    (tmp_path / ".tmp-step-000009").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_a_checkpoint_is_never_overwritten(tmp_path):
    save_checkpoint(tmp_path, 1, model=Net())
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_checkpoint(tmp_path, 1, model=Net())


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="'.*file' cannot be written"):
        save_checkpoint(tmp_path / "file", 1, model=Net())


def test_keep_of_zero(tmp_path):
    with pytest.raises(CheckpointError, match="keep is 0"):
        save_checkpoint(tmp_path, 1, model=Net(), keep=0)


def test_a_full_disk_is_reported_and_costs_no_older_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, model=Net(), keep=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="step-000002 cannot be written.*No space"):
        save_checkpoint(tmp_path, 2, model=Net(), keep=1)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path).name == "step-000001"
    load_checkpoint(tmp_path, model=Net())


# --- reading what is damaged or foreign


def truncate(name, count):
    def damage(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:count])

    return damage


def flip(name):
    def damage(path):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(bytes(content))

    return damage


def remove(name):
    return lambda path: (path / name).unlink()


def rewrite(change):
    """Change the JSON and make the sums right again: not damaged, but not ours."""

    def damage(path):
        state = json.loads((path / "state.json").read_text())
        change(state)
        sign(path, json.dumps(state).encode())

    return damage


def sign(path, state_bytes):
    (path / "state.json").write_bytes(state_bytes)
    names = ("tensors.safetensors", "state.json")
    sums = [f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (path / "SHA256SUMS").write_text("".join(sums))


def not_safetensors(path):
    (path / "tensors.safetensors").write_bytes(b"PK\x03\x04 some pickle")
    sign(path, (path / "state.json").read_bytes())


def lose_a_tensor(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "tensors.safetensors")
    del tensors["model/head.bias"]
    save_file(tensors, path / "tensors.safetensors")
    sign(path, (path / "state.json").read_bytes())


DAMAGE = {
    "tensors-truncated": (truncate("tensors.safetensors", -1), "tensors.safetensors is truncated"),
    "tensors-emptied": (truncate("tensors.safetensors", 0), "tensors.safetensors is truncated"),
    "tensors-bit": (flip("tensors.safetensors"), "tensors.safetensors is truncated or corrupt"),
    "state-truncated": (truncate("state.json", 100), "state.json is truncated or corrupt"),
    "state-bit": (flip("state.json"), "state.json is truncated or corrupt"),
    "sums-truncated": (truncate("SHA256SUMS", 70), "is truncated or corrupt"),
    "sums-emptied": (truncate("SHA256SUMS", 0), "is truncated or corrupt"),
    "no-tensors": (remove("tensors.safetensors"), "tensors.safetensors is missing"),
    "no-state": (remove("state.json"), "state.json is missing"),
    "no-sums": (remove("SHA256SUMS"), "SHA256SUMS is missing"),
    "nothing": (shutil.rmtree, "is missing"),
    "foreign-json": (rewrite(dict.clear), "is not of this library"),
    "json-list": (lambda path: sign(path, b"[1, 2]"), "is not of this library"),
    "no-json": (lambda path: sign(path, b"\x80 pickle"), "cannot be read"),
    "version": (rewrite(lambda s: s.update(version=99)), "version 99; this release reads 1"),
    "no-safetensors": (not_safetensors, "cannot be read"),
    "tensor-lost": (lose_a_tensor, "'model/head.bias' is missing"),
    "part-lost": (rewrite(lambda s: s.pop("optimizer")), "has no entry 'optimizer'"),
    "weight-is-text": (rewrite(lambda s: s["model"].update({"head.bias": "x"})), "'head.bias'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_is_refused_and_nothing_changes(name, tmp_path):
    damage, message = DAMAGE[name]
    path = save_checkpoint(tmp_path, 7, **trained(1))
    parts = trained(2)
    weights, state = weights_of(parts["model"]), flat_state(parts)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, **parts)
    assert "step-000007" in str(caught.value)
    assert_same_weights(weights_of(parts["model"]), weights)
    assert flat_state(parts) == state


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2)


class OtherHead(Net):
    def __init__(self):
        super().__init__()
        self.head = type(self.head)(16, 5, in_dim="width")


class Declared(Net):
    dimensions = {"width": 8, "depth": 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wider, r"lacks \['extra.bias', 'extra.weight'\] and has nothing besides"),
        (OtherHead, r"'head.weight' has shape and dtype \(\(4, 16\), torch.float32\)"),
        (lambda: Net().double(), "torch.float32.* in tensors.safetensors, .*torch.float64"),
        (Declared, "has dimensions .*16.* this one .*8"),
        (lambda: nn.Linear(3, 3), "has dimensions"),
    ],
    ids=["names", "shape", "dtype", "dimensions", "not-elastic"],
)
def test_checkpoint_of_another_model(make, message, tmp_path):
    save_checkpoint(tmp_path, 7, model=Net(seed=1))
    model = make()
    weights = weights_of(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path, model=model)
    assert "step-000007" in str(caught.value)
    assert_same_weights(weights_of(model), weights)


def other_groups(parts):
    named = dict(parts["model"].named_parameters())
    heads = [p for n, p in named.items() if n.startswith("head")]
    rest = [p for n, p in named.items() if not n.startswith("head")]
    parts["optimizer"] = torch.optim.AdamW([{"params": rest}, {"params": heads}], lr=0.1)
    del parts["scheduler"]


def other_objective(parts):
    parts["objective"] = Sandwich(SPACE)


def no_objective_state(parts):
    parts["objective"] = lambda model, batch, scale: None


def other_optimizer(parts):
    parts["optimizer"] = torch.optim.SGD(parts["model"].parameters(), lr=0.1)


def other_scheduler(parts):
    parts["scheduler"] = torch.optim.lr_scheduler.StepLR(parts["optimizer"], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_groups, r"parameter groups .* \[10\] parameters there, \[8, 2\] here"),
        (other_optimizer, "its optimizer is AdamW, but SGD was given"),
        (other_scheduler, "its scheduler is LambdaLR, but StepLR was given"),
        (other_objective, "its objective is Stochastic, but Sandwich was given"),
        (no_objective_state, "its objective is Stochastic, but None was given"),
    ],
)
def test_other_parts_than_the_checkpoint_has(change, message, tmp_path):
    save_checkpoint(tmp_path, 7, **trained(1))
    parts = trained(2)
    weights = weights_of(parts["model"])
    change(parts)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, **parts)
    assert_same_weights(weights_of(parts["model"]), weights)


def test_a_part_that_the_checkpoint_lacks(tmp_path):
    save_checkpoint(tmp_path, 7, model=Net())
    parts = trained(2)
    with pytest.raises(CheckpointError, match="its optimizer is None, but AdamW was given"):
        load_checkpoint(tmp_path, **parts)


def test_a_schedule_of_another_shape_resumes(tmp_path):
    """A LambdaLR's function is not in a checkpoint: one may resume with another."""
    save_checkpoint(tmp_path, 7, **trained(1))
    parts = trained(2)
    parts["scheduler"] = linear(parts["optimizer"], 50)
    load_checkpoint(tmp_path, **parts)
    assert parts["scheduler"].last_epoch == 3
