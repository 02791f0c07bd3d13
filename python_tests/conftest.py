"""Shared set-up: Triton's interpreter where there is no GPU, seeds, and the device of the tests."""

import os
import signal

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported anywhere
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell's background job, and some CI, start with Ctrl-C ignored, and so would every child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that share the tests share the cores, too: threads that wait for a core spin.
_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _processes > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // _processes))

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """One CPU thread: small layers gain nothing from a second, and threads that wait spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser):
    parser.addoption(
        "--ragged-problems",
        type=int,
        default=40,
        help="how many random ragged batches each test of them sees",
    )
    parser.addoption(
        "--ragged-seed", type=int, default=0, help="another number gives other random batches"
    )


def pytest_generate_tests(metafunc):
    """Give the tests that ask for ``ragged_runs`` one random ragged batch each."""
    if "ragged_runs" in metafunc.fixturenames:
        from support.ragged import random_problems

        count, seed = map(metafunc.config.getoption, ("--ragged-problems", "--ragged-seed"))
        ids = [f"problem{index}" for index in range(count)]
        metafunc.parametrize("ragged_runs", list(random_problems(seed, count)), ids=ids)


def pytest_collection_modifyitems(items):
    """Mark the tests that run on the GPU where there is one: by fixture or by module constant."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) or hasattr(item.module, "DEVICE"):
            item.add_marker("gpu")
