"""The record of measured tilings: buckets, the file, writers at the same time. No GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.errors import OptionError  # noqa: E402
from sorted_kernels.triton import autotune, gemm_launch, linear  # noqa: E402
from sorted_kernels.triton.autotune import GemmShape, Tuner  # noqa: E402
from sorted_kernels.triton.gemm_config import (  # noqa: E402
    HALF_CONFIGS,
    config_supports,
    supported_configs,
)
from sorted_kernels.triton.launch import DeviceLimits  # noqa: E402

SHAPE = GemmShape("_linear_kernel", 4000, 1000, 700, "torch.bfloat16", True)


class FakeTimer:
    """The third tiling is the fastest; counts what was measured."""

    def __init__(self, fastest=HALF_CONFIGS[2]):
        self.fastest, self.measured, self.running = fastest, [], None

    def run(self, config):
        self.running = config

    def __call__(self, call):
        call()
        self.measured.append(self.running)
        return 1.0 if self.running == self.fastest else 2.0


def tune(path, shape=SHAPE, timer=None, candidates=HALF_CONFIGS):
    timer = timer or FakeTimer()
    return Tuner(path, timer).config(shape, candidates, timer.run), len(timer.measured)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "missing" / "tilings.json"


def test_the_fastest_is_taken_and_kept(path):
    assert tune(path) == (HALF_CONFIGS[2], len(HALF_CONFIGS))
    assert tune(path, timer=FakeTimer(HALF_CONFIGS[0])) == (HALF_CONFIGS[2], 0)
    assert len(json.loads(path.read_text())) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


def test_a_size_in_the_same_bucket_is_not_measured_again(path):
    timer = FakeTimer()
    tuner = Tuner(path, timer)
    for rows, cols, reduction in [(4000, 1000, 700), (2049, 513, 513), (4096, 1024, 1024)]:
        shape = SHAPE._replace(rows=rows, cols=cols, reduction=reduction)
        assert tuner.config(shape, HALF_CONFIGS, timer.run) == HALF_CONFIGS[2]
    assert len(timer.measured) == len(HALF_CONFIGS)


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "_linear_dgrad_kernel"}, {"rows": 4097}, {"rows": 2048}, {"cols": 1025},
        {"reduction": 512}, {"dtype": "torch.float16"}, {"aligned": False},
    ],
    ids=str,
)  # fmt: skip
def test_another_bucket_is_measured(path, change):
    tune(path)
    assert tune(path, SHAPE._replace(**change))[1] == len(HALF_CONFIGS)
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"a": 1}', '{"a": {"block_m": 1}}', '{"a": {"unknown": 1}}', "\udcff\x00"],
    ids=repr,
)
def test_a_broken_file_is_ignored_with_a_warning_and_rewritten(path, text):
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="tilings.json is not a file of tilings"):
        assert tune(path) == (HALF_CONFIGS[2], len(HALF_CONFIGS))
    assert tune(path)[1] == 0


def test_a_tiling_that_the_device_does_not_support_is_measured_anew(path):
    tune(path)
    few = HALF_CONFIGS[:2]
    assert tune(path, timer=FakeTimer(few[1]), candidates=few) == (few[1], 2)


def test_a_tiling_that_does_not_fit_is_not_taken(path):
    from triton.runtime.errors import OutOfResources

    def timer(call):
        call()
        return 1.0

    def run(config):
        if config != HALF_CONFIGS[3]:
            raise OutOfResources(2, 1, "shared memory")

    assert Tuner(path, timer).config(SHAPE, HALF_CONFIGS, run) == HALF_CONFIGS[3]


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written"):
        config, _ = tune(tmp_path / "file" / "tilings.json")
    assert config == HALF_CONFIGS[2]


def test_a_kill_while_writing_leaves_the_old_file(path, monkeypatch):
    tune(path)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tune(path, SHAPE._replace(rows=1))
    assert path.read_text() == before


def test_threads_that_write_together_lose_nothing(path):
    def worker(first):
        for power in range(first, 24, 6):
            tune(path, SHAPE._replace(rows=1 << power))

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(path.read_text())) == 24


WRITER = """
import sys
from pathlib import Path
from test_triton_autotune import SHAPE, tune
for power in range(8):
    tune(Path(sys.argv[1]), SHAPE._replace(rows=1 << power, kernel=sys.argv[2]))
"""


def test_processes_that_write_together_lose_nothing(path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], env=environment)
        for name in ("a", "b")
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert len(json.loads(path.read_text())) == 16


def test_candidates_are_supported_whatever_the_rows():
    for limits in (DeviceLimits(84, 99 * 1024), DeviceLimits(132, 227 * 1024, True)):
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 16, 32, 4096):
                for aligned in (True, False):
                    candidates = supported_configs(rows, dtype, limits, aligned)
                    assert len(candidates) >= 2
                    for config in candidates:
                        assert config_supports(config, dtype, limits, aligned)


def test_off_unless_asked_and_without_a_gpu(monkeypatch):
    autotune._wanted.cache_clear()
    monkeypatch.setenv("SORTED_KERNELS_AUTOTUNE", "1")
    assert not autotune.enabled(torch.device("cpu"))
    assert autotune._wanted()
    autotune._wanted.cache_clear()
    monkeypatch.delenv("SORTED_KERNELS_AUTOTUNE")
    assert not autotune._wanted()
    autotune._wanted.cache_clear()
    monkeypatch.setenv("SORTED_KERNELS_AUTOTUNE", "perhaps")
    with pytest.raises(OptionError, match="SORTED_KERNELS_AUTOTUNE='perhaps'"):
        autotune._wanted()
    autotune._wanted.cache_clear()


def test_the_file_is_named_after_gpu_and_triton(monkeypatch, tmp_path):
    import triton

    monkeypatch.setenv("SORTED_KERNELS_CACHE", str(tmp_path))
    name = f"NVIDIA_H200_x_-triton-{triton.__version__}.json"
    assert autotune.cache_file("NVIDIA H200 (x)") == tmp_path / "autotune" / name
    monkeypatch.delenv("SORTED_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert autotune.cache_file("a").parent == tmp_path / "home" / "sorted_kernels" / "autotune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert autotune.cache_file("a").is_relative_to(Path.home())


def test_launches_take_the_tuned_tiling_and_never_tune_on_the_gradient(monkeypatch, path):
    """The launch as it is on a GPU, with the interpreter in its place."""
    timer = FakeTimer()
    seen = []

    def tuned(shape, like, run):
        def measured(config):
            timer.run(config)
            run(config)

        candidates = supported_configs(64, like.dtype, DeviceLimits(4, 99 * 1024), shape.aligned)
        seen.append(shape)
        timer.fastest = candidates[-1]
        return Tuner(path, timer).config(shape, candidates, measured)

    monkeypatch.setattr(autotune, "enabled", lambda device: True)
    monkeypatch.setattr(autotune, "tuned", tuned)
    assert gemm_launch.autotune is autotune
    x, dy, weight = (torch.randn(*sizes) for sizes in ((40, 30), (40, 50), (50, 30)))
    grad = torch.ones(50, 30)
    y, _ = linear.linear(x, weight, None, 50, "none", False)
    torch.testing.assert_close(y, x @ weight.T)
    runs = [(25, 50, 30), (15, 20, 10)]
    for call in (
        lambda: linear.linear_wgrad_into(dy, x, grad, True),
        lambda: linear.ragged_wgrad_into(dy, x, runs[:1], grad, True),
    ):
        grad.fill_(1)
        call()
        rows = 40 if len(seen) == 2 else 25
        torch.testing.assert_close(grad, 1 + dy[:rows].T @ x[:rows])
    assert [tuple(shape[:4]) for shape in seen] == [
        ("_linear_kernel", 40, 50, 30),
        ("_linear_wgrad_kernel", 50, 30, 40),
        ("_ragged_linear_wgrad_kernel", 50, 30, 25),
    ]
    assert len(timer.measured) > 6
