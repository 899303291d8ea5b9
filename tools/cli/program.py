"""Shared by the tests of the command: the program under test, and environments to run it in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

*LAUNCHER, PROGRAM = sys.argv[1:]  # an emulator and its options may come first


def run(*arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program; fails with its output if the exit status differs."""
    result = subprocess.run(
        [*LAUNCHER, PROGRAM, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if result.returncode != status:
        raise AssertionError(f"{arguments}: exit status {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def fake_package(site: Path, name: str, version: str, requirements: tuple[str, ...] = ()) -> None:
    """Writes a .dist-info as pip does."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    (folder / "METADATA").write_text("\n".join(lines) + "\n\nVersion: this is the description, not a field\n")


def fake_module(site: Path, name: str, text: str = "") -> None:
    """Writes an importable module and the packages above it."""
    file = site.joinpath(*name.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    for package in file.parents:
        if package == site:
            break
        (package / "__init__.py").touch()
    file.write_text(text)


class FakeVenv:
    """A virtual environment without packages."""

    def __init__(self, root: Path, system: bool = False) -> None:
        self.root = root
        venv.EnvBuilder(symlinks=True, with_pip=False, system_site_packages=system).create(root)
        (self.site,) = root.glob("lib/python3*/site-packages")

    def doctor(self, status: int = 0, **environment: str) -> dict:
        report = json.loads(run("doctor", "--json", status=status, VIRTUAL_ENV=str(self.root), **environment).stdout)
        assert report["python"]["found_by"] == "$VIRTUAL_ENV", report["python"]
        return report

    def errors(self, status: int = 0, **environment: str) -> list[str]:
        report = self.doctor(status, **environment)
        return [finding["text"] for finding in report["findings"] if finding["level"] == "error"]
