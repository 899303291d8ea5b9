"""The cases of compute-sanitizer run every kernel that there is; here, where no GPU is, only that they are listed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))


def test_every_kernel_is_run():
    import sanitizer_cases as sanitizer

    kernels = {kernel.name for kernel in sanitizer.kernel_list()}
    assert len(kernels) > 60
    listed = {*sanitizer.cases(), *sanitizer.OTHERS}
    assert set(sanitizer.RUN_BY.values()) <= listed
    by_others = {*sanitizer.RUN_BY, *sanitizer.NEVER_RUN}
    assert by_others <= kernels and not by_others & listed
    assert kernels <= listed | by_others


@pytest.mark.parametrize(
    "name",
    ["append_kv", "block lists", "backward functions", "backward functions, deterministic", "functions",
     "blocks of 128", "dropout"],
)  # fmt: skip
def test_other_cases(name):
    import sanitizer_cases as sanitizer

    assert sanitizer.OTHERS[name](torch.device("cpu")) == []
