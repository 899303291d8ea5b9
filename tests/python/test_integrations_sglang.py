"""flashspark in SGLang's released Python files on the CPU: the plug-in, the registry, and the backend's calls.

sglang_checks.py does it in a process of its own, which is full of stand-ins for what SGLang imports.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

HERE = Path(__file__).resolve().parent
# tools/dev/torch-cpu-venv.sh puts SGLang's files there, without what SGLang depends on.
FILES = Path(os.environ.get("FLASHSPARK_SGLANG_FILES") or Path(sys.prefix) / "integrations")
# Functions of sglang_checks.py, and how many checks each makes.
CHECKS = {
    "modes": 6, "features": 15, "fp8_cache": 2, "target_verify": 3, "target_verify_tree": 3, "captured_graph": 3,
    "draft": 1, "embeddings": 1, "deterministic": 1, "arguments": 1, "resolved_arguments": 1, "built_by_sglang": 1,
    "hybrid_on_blackwell": 1, "checks_of_models": 1, "refusals": 1, "others_are_untouched": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    if not (FILES / "sglang" / "srt").is_dir():
        pytest.skip("SGLang's files are not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("SGLANG_PLUGINS", None)
    words = [sys.executable, HERE / "sglang_checks.py", FILES]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("function", CHECKS)
def test_in_sglang(results, function):
    mine = {name: said for name, said in results.items() if name.split(" ")[0] == function}
    assert len(mine) == CHECKS[function], list(mine)
    failed = [f"{name}:\n{said}" for name, said in mine.items() if said]
    assert not failed, "\n".join(failed)


def test_there_are_no_other_checks(results):
    assert len(results) == sum(CHECKS.values())


def test_the_wheel_has_the_plug_in():
    """The group is SGLang's, as sglang/srt/plugins has it."""
    found = entry_points(group="sglang.srt.plugins", name="flashspark")
    assert [point.value for point in found] == ["flashspark.integrations.sglang:register"]


def test_nothing_is_imported_before_sglang_asks():
    words = [sys.executable, "-c", "import sys, flashspark.integrations.sglang; print(*sys.modules)"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert not {"sglang", "torch", "flashspark.integrations._sglang_backend"} & {*done.stdout.split()}
