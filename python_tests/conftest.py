"""Shared set-up: Triton's interpreter where there is no GPU, seeds, the device that tests run on."""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported anywhere
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
