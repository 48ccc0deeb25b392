"""Marks for tests that run Triton's kernels in its interpreter.

Triton before 3.7 (PyTorch 2.11 and older bring it) takes a loop's bound from an array of one number there, which NumPy
refuses since 2.4.
"""

from importlib import metadata

import pytest
import torch
from packaging.version import Version


def _is_older(package: str, version: str) -> bool:
    try:
        return Version(metadata.version(package)) < Version(version)
    except metadata.PackageNotFoundError:
        return False


_FAILS = _is_older("triton", "3.7") and not _is_older("numpy", "2.4")
_REASON = "this Triton's interpreter needs an older NumPy: pip install 'numpy<2.4'"
interpreted = pytest.mark.skipif(_FAILS, reason=_REASON)
interpreted_without_gpu = pytest.mark.skipif(_FAILS and not torch.cuda.is_available(), reason=_REASON)
