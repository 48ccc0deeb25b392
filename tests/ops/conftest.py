"""What the tests of the CUDA kernels share."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from emulator import SHARED_BYTES
from emulator import launch as emulated_launch


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulate(monkeypatch, libraries):
    """Makes memory that a kernel leaves unwritten NaN, and without a GPU the given modules' sources run on the CPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)

    def replace_launches(*modules):
        if torch.cuda.is_available():
            return
        for module in modules:
            monkeypatch.setattr(module, "launch", partial(emulated_launch, libraries))
            if hasattr(module, "max_shared"):
                monkeypatch.setattr(module, "max_shared", lambda like: SHARED_BYTES)
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())

    yield replace_launches
    torch.use_deterministic_algorithms(False)
