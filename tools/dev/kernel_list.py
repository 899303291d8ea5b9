"""Every kernel that is built, as kernels.json says: the sources' own data, printed by cmake/kernels_json.cpp."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Launch:
    """How an architecture launches it; with an instance, by its tile (Tile in config.hpp)."""

    threads: int
    min_ctas: int
    shared_bytes: int  # dynamic
    warps: int = 0
    warp_rows: int = 0
    warp_keys: int = 0
    keys: int = 0
    score_keys: int = 0
    key_groups: int = 0
    buffering: str = ""
    queries: str = ""
    # of the backward pass (BackwardTile)
    rows: int = 0
    score_rows: int = 0
    k: str = ""
    v: str = ""
    stages: str = ""
    sharing: str = ""


@dataclass(frozen=True)
class Kernel:
    name: str
    operation: str
    source: str  # in kernels/
    dtype: str  # empty: one kernel for all
    macros: tuple[str, ...]
    sm_90: Launch  # and sm_80
    sm_120f: Launch
    instance: str = ""  # empty: the operation has none, nor what follows
    head_dim: int = 0
    head_dim_v: int = 0
    tiling: str = ""
    score_mod: str = ""


@cache
def kernel_list() -> tuple[Kernel, ...]:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kernels_json"
        includes = ["-I", str(ROOT / "kernels"), "-I", str(ROOT / "src")]
        source = str(ROOT / "cmake/kernels_json.cpp")
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "-std=c++20", *includes, source, "-o", str(program)], check=True)
        rows = json.loads(subprocess.check_output([str(program)], text=True))
    changed = ("macros", "sm_90", "sm_120f")
    return tuple(
        Kernel(
            macros=tuple(row["macros"]),
            sm_90=Launch(**row["sm_90"]),
            sm_120f=Launch(**row["sm_120f"]),
            **{key: value for key, value in row.items() if key not in changed},
        )
        for row in rows
    )
