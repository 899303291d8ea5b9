"""The matrix of score functions, layouts, masks and block lists on the GPU, against float64.

30 functions in about 1,100 cases, for which about 200 kernels are compiled, each a second or two of one core. Cases are
named f00 to f29 by their function, so that processes may share them: FLASHSPARK_MATRIX_PART=2/15 runs every fifteenth
function's cases, from the third on; -k f07 runs one function's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from problem import ON_CPU

sys.path.insert(1, str(Path(__file__).parents[1] / "python"))
from flex_matrix import CASES, LARGE, SMALL, compare, make, run  # noqa: E402
from torch_arrays import back, moved  # noqa: E402

PART, PARTS = map(int, os.environ.get("FLASHSPARK_MATRIX_PART", "0/1").split("/"))
HERE = [case for case in CASES if case.number % PARTS == PART]


@pytest.mark.parametrize("case", HERE, ids=map(str, HERE))
def test_case(case, device):
    call = make(case, SMALL if ON_CPU else LARGE)
    out, lse = run(call, lambda x: moved(x, device))
    compare(call, back(out), back(lse))
