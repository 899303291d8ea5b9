"""GPU tests of the installed package. Without torch or a GPU none is collected, and the run fails.

FLASHSPARK_GPU_TESTS_ON_CPU=1 runs those that can run on CPU tensors: this checks the tests, not the kernels.
"""

from __future__ import annotations

import pytest

try:
    import torch
    from problem import ON_CPU

    READY = ON_CPU or torch.cuda.is_available()
except ImportError:
    READY = ON_CPU = False

if not READY:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header(config):
    if not READY:
        return None
    return "tests/gpu: on CPU tensors" if ON_CPU else f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter):
    if not READY:
        terminalreporter.write_line("tests/gpu: nothing ran, there is no torch or it sees no GPU")


def pytest_collection_modifyitems(items):
    for item in items:
        if ON_CPU and item.get_closest_marker("needs_gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_gpu: has no meaning on CPU tensors")


@pytest.fixture
def device():
    return torch.device("cpu" if ON_CPU else "cuda")
