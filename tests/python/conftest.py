"""Shared fixtures. The tests import the installed package; nothing of the source tree is on the path."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def pytest_sessionstart(session):
    import flashspark

    tree = Path(__file__).resolve().parents[2] / "python"
    if Path(flashspark.__file__).resolve().is_relative_to(tree):
        raise pytest.UsageError(f"flashspark is imported from {tree}: install the wheel and run from elsewhere")


@pytest.fixture(autouse=True)
def _generators_of_the_test(request):
    """The global generators depend only on the test's name, too: not on the tests that ran before it."""
    seed = zlib.crc32(request.node.name.encode())
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture
def rng(request):
    """Random numbers that depend only on the test's name."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(params=list(DTYPES))
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture
def normal(rng):
    """normal(shape, dtype): standard normal values."""
    return lambda *shape, dtype=np.float32: rng.standard_normal(shape).astype(dtype)
