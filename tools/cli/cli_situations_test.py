"""What the command says about drivers that are old, broken or without a GPU. Standard library only.

The rest of docs/integrations.md's table of bad situations is in cli_kernels_test.py, cli_python_test.py and
tests/python/test_not_loaded.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

from program import PROGRAM, run

FAKE_CUDA = os.environ.get("FLASHSPARK_FAKE_CUDA", "")  # folder of a libcuda.so.1 that has no GPU behind it
LIBRARY = Path(PROGRAM).resolve().parents[2] / "libflashspark.so"
SM12X = {"FAKE_CUDA_DEVICE": "NVIDIA GeForce RTX 5090"}


def troubles(**environment: str) -> list[tuple[str, str]]:
    """Warnings and errors about the GPU, with their mends."""
    said = run("doctor", "--json", VIRTUAL_ENV="", PATH="", **{"LD_LIBRARY_PATH": FAKE_CUDA, **environment}).stdout
    findings = json.loads(said)["findings"]
    return [(f["text"], f["mend"]) for f in findings if f["level"] != "note"]


@unittest.skipUnless(FAKE_CUDA, "built without CUDA kernels")
class Gpu(unittest.TestCase):
    def expect(self, text: str, mend: str, **environment: str) -> None:
        found = troubles(**environment)
        self.assertEqual(len(found), 1, found)
        self.assertIn(text, found[0][0])
        self.assertIn(mend, found[0][1])

    def test_none_is_wrong_with_a_new_driver(self) -> None:
        self.assertEqual(troubles(**SM12X), [])

    def test_older_than_525(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(LIBRARY, Path(folder) / "libcuda.so.1")  # any library without cuGetProcAddress_v2
            text = "gives no GPU: the NVIDIA driver is older than CUDA 12.0; update it to version 580 or newer"
            self.expect(text, "the NVIDIA driver 580", LD_LIBRARY_PATH=folder)

    def test_525_and_535_are_refused(self) -> None:
        for version, name in (("12000", "12.0"), ("12020", "12.2")):
            text = (
                f"refused: the NVIDIA driver offers CUDA {name}, too old to load the kernels; update it to version 580"
            )
            self.expect(text, "the NVIDIA driver 580", FAKE_CUDA_VERSION=version, **SM12X)

    def test_550_and_570_may_not_load_what_cuda_13_compiled(self) -> None:
        for version, name in (("12040", "12.4"), ("12080", "12.8")):
            environment = {"FAKE_CUDA_VERSION": version, **SM12X}
            self.expect(f"offers CUDA {name}; kernels that CUDA 13", "the NVIDIA driver 580", **environment)
            fails = {**environment, "FAKE_CUDA_LOAD": "200", "LD_LIBRARY_PATH": FAKE_CUDA}
            said = run("verify", "--filter", "edge/one-key", status=1, **fails)
            self.assertIn(f"offers CUDA {name} and does not load the kernels (cuLibraryLoadData", said.stderr)
            self.assertIn("update it to version 580 or newer", said.stderr)
            self.assertEqual(said.stderr.count("\n"), 1)

    def test_cuda_visible_devices(self) -> None:
        mend = "unset CUDA_VISIBLE_DEVICES, or set it to one that nvidia-smi -L lists"
        for value, shown in (("", '""'), ("7", "7"), ("MIG-0", "MIG-0")):
            hidden = {"FAKE_CUDA_INIT": "100", "CUDA_VISIBLE_DEVICES": value}
            self.expect(f"no GPU: the NVIDIA driver finds none with CUDA_VISIBLE_DEVICES={shown}", mend, **hidden)

    def test_containers_and_updates(self) -> None:
        for result, text in {
            "34": "libcuda.so.1 is the toolkit's stub",
            "803": "in a container leave libcuda.so.1 to the NVIDIA container toolkit",
            "804": "update the host's driver",
            "999": "cuInit: CUDA_ERROR_UNKNOWN (999)",
        }.items():
            self.expect(text, "nvidia-smi shows", FAKE_CUDA_INIT=result)

    def test_a_mig_instance_is_a_gpu(self) -> None:
        name = "NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 1g.24gb"
        there = {"FAKE_CUDA_DEVICE": name, "FAKE_CUDA_SMS": "14", "LD_LIBRARY_PATH": FAKE_CUDA}
        self.assertEqual(troubles(**there), [])
        self.assertIn(f"{name}, compute capability 12.0", run("doctor", **there).stdout)


class WithoutALibrary(unittest.TestCase):
    def test_it_is_a_note(self) -> None:
        if Path("/proc/driver/nvidia/version").exists():
            self.skipTest("this machine has an NVIDIA driver")
        said = json.loads(run("doctor", "--json", VIRTUAL_ENV="", PATH="").stdout)
        self.assertEqual(said["cuda"]["driver_error"], "no NVIDIA driver: libcuda.so.1 is not found")
        self.assertEqual([f["level"] for f in said["findings"] if "GPU" in f["text"]], ["note"])


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
