"""The start-up hook as the wheel installs it: quick, silent, and idle until vLLM is imported. vLLM is not needed."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import subprocess
import sys
import timeit
from importlib.metadata import entry_points, files
from pathlib import Path

import pytest

PTH = next((Path(f.locate()) for f in files("flashspark") if f.name == "flashspark.pth"), None)
START = sys.version_info >= (3, 15)  # reads flashspark.start
WATCHED = "vllm.v1.attention.backends.fa_utils"


def python(*arguments: str, **environment: str) -> str:
    """Standard output of a new interpreter, which must print nothing else."""
    run = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stdout + run.stderr
    return run.stdout.strip()


@pytest.fixture
def fake_vllm(tmp_path):
    """A package with the one module that the hook watches; it prints what the hook does."""
    folder = tmp_path / "vllm/v1/attention/backends"
    folder.mkdir(parents=True)
    for parent in (folder, *folder.parents[:3]):
        (parent / "__init__.py").write_text("")
    (folder / "fa_utils.py").write_text("def get_flash_attn_version(): return 2\n")
    return str(tmp_path)


def test_the_wheel_has_it():
    assert PTH is not None and PTH.parent == Path(importlib.import_module("flashspark").__file__).parents[1]
    target = PTH.with_suffix(".start").read_text().strip()
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert [e.value for e in entry_points(group="vllm.general_plugins", name="flashspark")] == [
        "flashspark.vllm:register"
    ]


def test_it_is_armed_and_idle():
    """Python 3.15 and newer read flashspark.start and skip the matching line of flashspark.pth.

    Older versions execute the line of a .pth file twice in a virtual environment.
    """
    ours = "sorted({type(f).__name__ for f in sys.meta_path} & {'Finder', '_FlashSparkStart'})"
    loaded = "[name for name in sys.modules if name.startswith('flashspark')]"
    said = python("-c", f"import sys, json; print({ours}, {loaded})")
    expected = "['Finder'] ['flashspark', 'flashspark._hook']" if START else "['_FlashSparkStart'] []"
    assert said == expected, said


def test_the_start_file_imports_nothing_else():
    """Importing typing alone would slow every interpreter's start noticeably."""
    code = f"import os, sys; sys.path.append({str(PTH.parent)!r}); before = {{*sys.modules}}; import flashspark._hook"
    said = python("-S", "-c", f"{code}; print(*sorted({{*sys.modules}} - before))")
    assert said == "__future__ flashspark flashspark._hook", said


def test_one_start_costs_less_than_a_millisecond():
    line = PTH.read_text()

    def start():
        exec(line)
        sys.meta_path.pop(0)

    assert min(timeit.repeat(start, number=20, repeat=5)) / 20 < 1e-3


def test_the_report_asks_no_finder_for_pip():
    """setuptools has one that then keeps its distutils away, and vLLM imports setuptools."""
    code = """
    class Asked:
        def find_spec(name, path=None, target=None):
            if name == "pip":
                print("asked")
    sys.meta_path.insert(0, Asked)
    import flashspark.vllm.doctor
    print(flashspark.vllm.doctor.REINSTALL)
    """
    said = python("-c", "import sys, textwrap; exec(textwrap.dedent(sys.argv[1]))", code)
    pip = "pip" if importlib.machinery.PathFinder.find_spec("pip") else "uv pip"
    assert said == f"install an intact wheel: {pip} install --no-deps --force-reinstall flashspark-*.whl"


def test_silent_when_the_package_is_gone(tmp_path, fake_vllm):
    (tmp_path / "flashspark.pth").write_text(PTH.read_text())
    code = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r}); import vllm; print(vllm.__file__, len(sys.meta_path))"
    )
    assert python("-S", "-c", code).startswith(fake_vllm)


def test_importing_vllm_arms_the_real_hook(fake_vllm):
    names = "[type(f).__name__ for f in sys.meta_path]"
    code = f"import sys; import vllm; print({names}, 'flashspark.vllm' in sys.modules)"
    said = python("-c", code, PYTHONPATH=fake_vllm)
    assert said.count("'Finder'") == 1 and said.endswith("False"), said


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_finder_behind_it_is_asked(fake_vllm, value):
    """sys.meta_path may change while the import system iterates over it."""
    code = """
import sys
class Probe:
    def find_spec(self, name, path=None, target=None):
        asked.append(name)
asked = []
ours = [n for n, f in enumerate(sys.meta_path) if type(f).__name__ in ("Finder", "_FlashSparkStart")]
sys.meta_path.insert(max(ours, default=-1) + 1, Probe())
import vllm
print("vllm" in asked)
"""
    assert python("-c", code, PYTHONPATH=fake_vllm, FLASHSPARK=value) == "True"


@pytest.mark.parametrize("switch", ["FLASHSPARK", "FA4_SM120_SHIM"])
def test_switched_off(fake_vllm, switch):
    names = "[type(f).__name__ for f in sys.meta_path], m.__spec__.loader"
    code = f"import sys, vllm, {WATCHED} as m; print({names}, 'flashspark.vllm' in sys.modules)"
    said = python("-c", code, PYTHONPATH=fake_vllm, **{switch: "0"})
    assert "'Finder'" not in said and "SourceFileLoader" in said and said.endswith("False"), said


def test_a_module_loads_as_ever_when_we_fail(fake_vllm):
    """The fake package is not vLLM: the hook's call fails and is logged, and the module stays unchanged."""
    code = f"import vllm, {WATCHED} as m; print(m.get_flash_attn_version(), type(m.__spec__.loader).__name__)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": fake_vllm}
    )
    assert run.stdout.strip() == "2 SourceFileLoader", run.stdout + run.stderr
    assert "keeps its own attention" in run.stderr, run.stderr
