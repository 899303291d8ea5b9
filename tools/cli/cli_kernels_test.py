"""Where the command finds its kernels, which are those of an installed libflashspark.so. Standard library only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from program import LAUNCHER, PROGRAM, run

VERSION = run("--version").stdout.split()[1]
LIBRARY = Path(PROGRAM).resolve().parents[2] / "libflashspark.so"
SITE = "lib/python3.11/site-packages/flashspark"
LAYOUTS = (  # folders of the command and of the library
    ("bin", SITE),
    ("bin", "lib64/python3.15/dist-packages/flashspark"),
    ("bin", "lib/pypy3.10/site-packages/flashspark"),
    ("bin", "flashspark"),  # pip install --target
    (f"flashspark-{VERSION}.data/scripts", "flashspark"),  # an unpacked wheel
)


def kernels(report: str) -> dict[str, str | None]:
    return json.loads(report)["kernels"]


BUILT = kernels(run("doctor", "--json", VIRTUAL_ENV="").stdout)


class Kernels(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)

    def install(self, command: str = "bin", library: str = "") -> Path:
        """Copies of both; the path of the library's."""
        for file, folder in ((Path(PROGRAM), command), (LIBRARY, library)):
            if folder:
                (self.root / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.root / folder)
        return self.root / library / LIBRARY.name

    def command(self, *arguments: str, folder: str = "bin") -> str:
        words = [*LAUNCHER, str(self.root / folder / "flashspark"), *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=600).stdout

    def found(self, folder: str = "bin") -> dict[str, str | None]:
        return kernels(self.command("doctor", "--json", folder=folder))

    def test_every_layout(self) -> None:
        self.assertNotEqual(BUILT["architectures"] is None, BUILT["missing"] is None)
        for command, library in LAYOUTS:
            with self.subTest(library=library):
                self.install(command, library)
                self.assertEqual(self.found(command), BUILT)
                shutil.rmtree(self.root / library)
                self.assertIsNone(self.found(command)["architectures"])

    def test_alone_it_says_so_and_computes(self) -> None:
        self.install()
        missing = f"the kernels are in libflashspark.so, which is not installed beside {self.root.resolve()}/bin"
        self.assertEqual(self.found(), {"architectures": None, "missing": missing})
        self.assertIn(f"none: {missing}", self.command("doctor"))
        self.assertIn("PASSED", self.command("verify", "--filter", "edge/one-key"))

    def change(self, library: Path, old: bytes, new: bytes) -> None:
        data = library.read_bytes()
        self.assertEqual(data.count(old), 1)
        library.write_bytes(data.replace(old, new))

    def test_a_library_of_another_version_is_not_taken(self) -> None:
        library = self.install(library=SITE)
        other = ".".join("9" * len(part) for part in VERSION.split("."))
        self.change(library, f"\0{VERSION}\0".encode(), f"\0{other}\0".encode())
        missing = f"{library.resolve()} is of {other}, this command of {VERSION}"
        self.assertEqual(self.found(), {"architectures": None, "missing": missing})
        # Two Pythons under one prefix share the command: the library that fits is found.
        self.install(library="lib/python3.14/site-packages/flashspark")
        self.assertEqual(self.found(), BUILT)

    def test_nor_one_of_other_kernel_sources(self) -> None:
        library = self.install(library=SITE)
        self.change(library, b"// Forward attention: every CTA", b"// forward attention: every CTA")
        self.assertIn(f"another build of {VERSION}", str(self.found()["missing"]))

    def test_nor_what_is_no_library_of_ours(self) -> None:
        library = self.install(library=SITE)
        library.write_text("no library at all")
        self.assertIn(f"{library.resolve()}: ", str(self.found()["missing"]))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
