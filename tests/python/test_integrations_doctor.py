"""What `flashspark doctor` says of other programs, from their metadata alone; and that docs/integrations.md is true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flashspark.integrations import doctor

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "integrations.md").read_text()


@pytest.fixture
def environment(monkeypatch):
    """environment({distribution: version}) makes these the ones that are installed."""

    def install(versions):
        monkeypatch.setattr(doctor, "installed", versions.get)
        return dict(doctor.lines())

    return install


def test_nothing_installed(environment):
    assert environment({"numpy": "2"}) == {}


def test_transformers_needs_a_call(environment):
    lines = environment({"transformers": "5.17.0"})
    assert lines == {
        "transformers": "5.17.0, uses flashspark when told: flashspark.integrations.transformers.register(), "
        'then attn_implementation="flashspark"'
    }


def test_comfyui_is_found_by_its_frontend(environment):
    [line] = environment({"comfyui-frontend-package": "1.45.21"}).values()
    assert line.startswith("1.45.21, uses flashspark when told: integrations/comfyui of")


def test_sglang_needs_an_argument(environment):
    lines = environment({"sglang": "0.5.23"})
    assert lines == {"SGLang": "0.5.23, uses flashspark when told: --attention-backend flashspark"}


@pytest.mark.parametrize(
    ("version", "flash_attn", "diffusers"),
    [
        (None, "", "0.42.1, does not use flashspark: pip install --no-deps flash_attn-"),
        ("2.8.3", "2.8.3: flash-attention itself; ", "0.42.1, does not use flashspark: pip install"),
        (
            "2.8.3+flashspark.0.1.0",
            "2.8.3+flashspark.0.1.0: flashspark's stand-in",
            "0.42.1, uses flashspark's flash_attn",
        ),
    ],
)
def test_who_owns_flash_attn(environment, version, flash_attn, diffusers):
    lines = environment({"flash-attn": version, "diffusers": "0.42.1"})
    assert lines.get("flash_attn", "").startswith(flash_attn) and lines["diffusers"].startswith(diffusers)
    assert ("flash_attn" in lines) == (version is not None)


def test_modules_that_this_build_does_not_have(environment, monkeypatch):
    monkeypatch.setitem(doctor.PROGRAMS, "Other", doctor.Program("other", "switch", needs="flashspark.no.such.module"))
    assert "Other" not in environment({"other": "1"})


def test_as_the_command_asks():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flashspark.integrations.doctor"], capture_output=True, text=True
    )
    lines = json.loads(done.stdout.splitlines()[-1])["lines"]
    assert all(len(line) == 2 for line in lines)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "numpy", "tvm_ffi"}


def test_the_matrix_has_every_program():
    cells = re.findall(r"^\| ([^|]+) \|", TEXT, flags=re.MULTILINE)
    missing = [name for name in doctor.PROGRAMS if not any(name.lower() in cell.lower() for cell in cells)]
    assert not missing and len(cells) > len(doctor.PROGRAMS)


def test_the_matrix_names_files_and_versions_that_are_there():
    for path in re.findall(r"`((?:tests|docs|integrations)/[\w/.]+)`", TEXT) + re.findall(r"\]\(((?!#)[^)]+)\)", TEXT):
        assert (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path
    pins = (ROOT / "tools" / "dev" / "torch-cpu-venv.sh").read_text()
    for name in ("transformers", "diffusers", "xformers"):
        version = re.search(rf"{name}==([\d.]+)", pins)[1]
        assert re.search(rf"{name} {re.escape(version.removesuffix('.0'))}", TEXT) or f"CPU, {version[:4]}" in TEXT, (
            name
        )
    version = re.search(r"sglang==([\d.]+)", pins)[1]
    assert f"SGLang](#sglang) {version} " in TEXT
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)(?: ([\w-]+))?`", TEXT):
        assert all(re.search(rf"^{name}:", targets, flags=re.MULTILINE) for name in target if name), target
