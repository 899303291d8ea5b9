"""What the command reports about Python environments, in all their layouts. Standard library only."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from program import LAUNCHER, PROGRAM, FakeVenv, fake_module, fake_package, run

VERSION = run("--version").stdout.split()[1]
NEEDS = ("apache-tvm-ffi>=0.1.9", "numpy>=1.24,<3", "ml-dtypes>=0.4", "torch; extra == 'x'")
INSTALLED = {"apache-tvm-ffi": "0.1.15.post2", "numpy": "2.1.0", "ml-dtypes": "0.5.4"}


def stderr_of_a_terminal(*arguments: str, **environment: str) -> str:
    """Standard error, as somebody at a terminal sees it."""
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        environment = {**os.environ, **environment}
        subprocess.run([*LAUNCHER, PROGRAM, *arguments], env=environment, stdout=subprocess.PIPE, stderr=theirs)
        text = terminal.read(4096).decode() if select.select([terminal], [], [], 0)[0] else ""
        os.close(theirs)
    return text


class Environment(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        self.venv = FakeVenv(self.root / "venv")
        self.other = self.root / "other's packages"
        self.other.mkdir()

    def install(self, *folders: Path) -> None:
        """Distributes flashspark and its requirements over the folders."""
        fake_package(self.venv.site, "flashspark", VERSION, NEEDS)
        for n, (name, version) in enumerate(INSTALLED.items()):
            fake_package(folders[n % len(folders)], name, version)

    def check(self, **environment: str) -> None:
        report = self.venv.doctor(**environment)
        self.assertEqual([f for f in report["findings"] if f["level"] == "error"], [])
        self.assertEqual(report["python"]["packages"], {"flashspark": VERSION, **INSTALLED})


class Layers(Environment):
    """A package counts as installed wherever the interpreter imports it from."""

    def test_one_folder(self) -> None:
        self.install(self.venv.site)
        self.check()

    def test_pth_file(self) -> None:
        self.install(self.other)
        (self.venv.site / "other.pth").write_text(f"{self.other}\n")
        self.check()

    def test_pth_file_that_runs_code(self) -> None:
        self.install(self.other)
        (self.venv.site / "other.pth").write_text(f"import site; site.addsitedir({str(self.other)!r})\n")
        self.check()

    def test_pth_file_of_a_pth_file(self) -> None:
        third = self.root / "third"
        third.mkdir()
        self.install(self.other, third)
        (self.venv.site / "other.pth").write_text(f"import site; site.addsitedir({str(self.other)!r})\n")
        (self.other / "third.pth").write_text(f"{third}\n")
        self.check()

    def test_pythonpath(self) -> None:
        self.install(self.other, self.venv.site)
        self.check(PYTHONPATH=str(self.other))

    def test_all_of_it_on_pythonpath(self) -> None:
        for name, version in INSTALLED.items():
            fake_package(self.other, name, version)
        fake_package(self.other, "flashspark", VERSION, NEEDS)
        self.check(PYTHONPATH=str(self.other))

    def test_sitecustomize(self) -> None:
        self.install(self.other)
        code = f"import sys; sys.path.append({str(self.other)!r}); print('noise')\n"
        (self.venv.site / "sitecustomize.py").write_text(code)
        self.check()

    def test_egg_info(self) -> None:
        self.install(self.venv.site)
        (folder,) = self.venv.site.glob("numpy-*.dist-info")
        (folder / "METADATA").rename(folder / "PKG-INFO")
        folder.rename(self.other / "numpy.egg-info")
        self.check(PYTHONPATH=str(self.other))

    def test_a_module_without_metadata_is_there(self) -> None:
        fake_package(self.venv.site, "flashspark", VERSION, NEEDS)
        for name in ("tvm_ffi.core", "numpy.core", "ml_dtypes.core"):
            fake_module(self.other, name)
        report = self.venv.doctor(PYTHONPATH=str(self.other))
        self.assertEqual({report["python"]["packages"][name] for name in INSTALLED}, {"unknown"})

    def test_the_first_on_the_path_counts(self) -> None:
        self.install(self.venv.site)
        fake_package(self.other, "numpy", "1.0")
        self.assertIn("but 1.0 is installed", self.venv.errors(1, PYTHONPATH=str(self.other))[0])
        (self.venv.site / "other.pth").write_text(f"{self.other}\n")  # comes after site-packages
        self.check()

    def test_a_folder_off_the_path_does_not_count(self) -> None:
        self.install(self.other)
        self.assertEqual(len(self.venv.errors(1)), 3)
        self.assertEqual(len(self.venv.errors(1, PYTHONPATH=str(self.root))), 3)

    def test_the_current_folder_does_not_count(self) -> None:
        self.install(self.venv.site)
        fake_package(self.other, "numpy", "1.0")
        environment = {**os.environ, "VIRTUAL_ENV": str(self.venv.root)}
        command = [*LAUNCHER, str(Path(PROGRAM).resolve()), "doctor", "--json"]
        out = subprocess.run(command, cwd=self.other, env=environment, capture_output=True, text=True).stdout
        self.assertEqual(json.loads(out)["python"]["packages"]["numpy"], "2.1.0")

    def test_packages_of_the_system(self) -> None:
        system = FakeVenv(self.root / "system", system=True)
        found = system.doctor(status=system_status(system))["python"]["site_folders"]
        self.assertEqual(found[0], os.path.realpath(system.site))
        self.assertGreater(len(found), 1)


def system_status(system: FakeVenv) -> int:
    """doctor's exit status may reflect that this machine's own Python misses a package."""
    command = [*LAUNCHER, PROGRAM, "doctor"]
    environment = {**os.environ, "VIRTUAL_ENV": str(system.root)}
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode


class Troubles(Environment):
    def test_they_have_mends(self) -> None:
        site = self.venv.site
        fake_package(site, "flashspark", "0.0.9", ("apache-tvm-ffi>=0.1.9", "numpy (>=1.24,<3)", "Else.Where_too>1"))
        fake_package(site, "apache-tvm-ffi", "0.1.8")
        (site / "zzz_fa4_sm120_shim.pth").write_text("import fa4_sm120_shim\n")
        (site / "fa4_sm120_shim.py").write_text("")
        findings = [f for f in self.venv.doctor(status=1)["findings"] if f["level"] != "note"]
        for part in ["0.0.9", "ffi>=0.1.9 but 0.1.8", "numpy>=1.24,<3", "else-where-too>1", "shim.py", "shim.pth"]:
            found = [f for f in findings if part in f["text"]]
            self.assertEqual(len(found), 1, (part, findings))
            self.assertTrue(found[0]["mend"])

    def test_two_installs(self) -> None:
        self.install(self.venv.site)
        self.check()
        fake_package(self.other, "flashspark", "0.0.9")
        (self.venv.site / "other.pth").write_text(f"{self.other}\n")
        (text,) = self.venv.errors(1)
        self.assertIn(f"installed 2 times, and Python imports the first: {VERSION} in ", text)
        self.assertIn(f"0.0.9 in {os.path.realpath(self.other)}/flashspark-0.0.9.dist-info", text)
        # The same folder twice on the path is one installation.
        (self.venv.site / "other.pth").write_text(f"{self.venv.site}\n")
        self.check(PYTHONPATH=str(self.venv.site))

    def test_a_library_of_another_version_is_loaded(self) -> None:
        self.install(self.venv.site)
        fake_module(self.venv.site, "flashspark.rest")
        (self.venv.site / "flashspark" / "__init__.py").write_text("def native_version(): return '0.0.9'\n")
        self.assertEqual(self.venv.errors(1), [f"the Python package is {VERSION} but loads a library of 0.0.9"])

    def test_a_library_that_does_not_load(self) -> None:
        self.install(self.venv.site)
        fake_module(self.venv.site, "flashspark.rest")
        module = self.venv.site / "flashspark" / "__init__.py"
        module.write_text("def native_version(): raise ImportError('is for aarch64\\nand more')\n")
        self.assertEqual(self.venv.errors(1), ["flashspark cannot be imported: ImportError: is for aarch64"])
        module.write_text("import os; os.abort()\n")
        self.assertEqual(self.venv.errors(1), ["flashspark cannot be imported: the interpreter crashes"])

    def test_metadata_without_a_version(self) -> None:
        (self.venv.site / "numpy-2.1.0.dist-info").mkdir()
        (self.venv.site / "numpy-2.1.0.dist-info" / "METADATA").write_text("Name: numpy\n")
        self.assertIn("no version in", self.venv.errors(1)[0])

    def test_an_interpreter_that_does_not_run(self) -> None:
        interpreter = self.venv.root / "bin" / "python3"
        interpreter.unlink()
        for text in ("#!/bin/sh\nexit 1\n", "#!/bin/sh\necho noise\n", "#!/nonexistent\n"):
            interpreter.write_text(text)
            interpreter.chmod(0o755)
            self.assertIn("does not run", self.venv.errors(1)[0])

    def test_mends_name_a_pip_that_is_there(self) -> None:
        def mends() -> list[str]:
            return [f["mend"] for f in self.venv.doctor()["findings"] if "flashspark-*.whl" in (f["mend"] or "")]

        fake_package(self.venv.site, "vllm", "0.25.1")
        python = f"{self.venv.root}/bin/python3"
        self.assertEqual(mends(), [f"uv pip install --python {python} flashspark-*.whl"] * 2)
        fake_module(self.venv.site, "pip.main")
        self.assertEqual(mends(), [f"{python} -m pip install flashspark-*.whl"] * 2)


class Vllm(Environment):
    def test_is_asked_through_its_python(self) -> None:
        said = {
            "lines": [["vLLM", "0.25.1, attention: served by flashspark"]],
            "findings": [{"level": "warning", "text": "VLLM_PLUGINS is odd", "mend": "unset it"}],
        }
        site = self.venv.site
        fake_package(site, "vllm", "0.25.1")
        self.assertIn("without flashspark", self.venv.doctor()["findings"][-1]["text"])
        fake_package(site, "flashspark", VERSION)
        self.assertTrue(any("could not be asked" in f["text"] for f in self.venv.doctor()["findings"]))
        fake_module(site, "flashspark.vllm.doctor", f"print('noise')\nprint({json.dumps(said)!r})\n")
        report = self.venv.doctor()
        self.assertEqual(report["vllm"], said)
        self.assertTrue(any(f["text"] == "VLLM_PLUGINS is odd" for f in report["findings"]))
        there = {"VIRTUAL_ENV": str(self.venv.root)}
        result = run("doctor", **there)
        self.assertIn("served by flashspark", result.stdout)
        self.assertEqual(result.stderr, "")
        self.assertEqual(stderr_of_a_terminal("doctor", **there).count("asking vLLM 0.25.1"), 1)
        fake_module(site, "flashspark.vllm.verify", "import sys; print(*sys.argv[1:]); sys.exit(1)\n")
        self.assertEqual(run("verify", "--vllm", "--seed", "7", status=1, **there).stdout, "--seed 7\n")

    def test_other_programs_are_listed_by_its_python(self) -> None:
        there, said = {"VIRTUAL_ENV": str(self.venv.root)}, {"lines": [["diffusers", "0.42.1, uses flashspark"]]}
        self.assertIsNone(self.venv.doctor()["programs"])
        fake_package(self.venv.site, "flashspark", VERSION)  # without the module, as an older one
        self.assertIsNone(self.venv.doctor()["programs"])
        fake_module(self.venv.site, "flashspark.integrations.doctor", f"print({json.dumps(said)!r})\n")
        self.assertEqual(self.venv.doctor()["programs"], said)
        self.assertIn("diffusers", run("doctor", **there).stdout)

    def test_verify_without_it(self) -> None:
        text = run("verify", "--vllm", status=2, VIRTUAL_ENV=str(self.venv.root)).stderr
        self.assertIn("--vllm", text)

    def test_uninstall_removes_the_hook(self) -> None:
        files = [self.venv.site / "flashspark.pth", self.venv.site / "flashspark.start"]
        for file in files:
            file.write_text("")
        self.assertEqual(self.venv.doctor()["python"]["hook_files"], [str(f) for f in files])
        there = {"VIRTUAL_ENV": str(self.venv.root)}
        text = run("uninstall", **there).stdout
        self.assertEqual([str(f) in text and not f.exists() for f in files], [True, True])
        self.assertIn("no start-up hook", run("uninstall", **there).stdout)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
