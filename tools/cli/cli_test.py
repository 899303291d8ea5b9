"""Runs the flashspark command as a user would and checks exit status, JSON and text. Standard library only."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import ClassVar

from program import LAUNCHER, FakeVenv, run

FAKE_CUDA = os.environ.get("FLASHSPARK_FAKE_CUDA", "")  # folder of a libcuda.so.1 that has no GPU behind it


class Usage(unittest.TestCase):
    def test_version(self) -> None:
        self.assertRegex(run("--version").stdout, r"^flashspark \d+\.\d+\.\d+\n$")

    def test_help_has_examples(self) -> None:
        for command in [[], ["doctor"], ["verify"], ["bench"], ["bench", "decode"], ["bench", "flex"]]:
            self.assertIn("Examples:", run(*command, "--help").stdout)

    def test_wrong_usage_is_2_and_names_the_option(self) -> None:
        run(status=2)
        self.assertIn("nonsense", run("nonsense", status=2).stderr)
        self.assertIn("--nonsense", run("verify", "--nonsense", status=2).stderr)
        self.assertIn("--threads", run("verify", "--threads", "-1", status=2).stderr)
        self.assertIn("--seconds", run("bench", "--seconds", "0", status=2).stderr)
        self.assertIn("no-such-case", run("verify", "--filter", "no-such-case", status=2).stderr)
        self.assertIn("cpu-engine", run("verify", "--implementation", "no-such", status=2).stderr)
        self.assertIn("cpu-engine", run("bench", "--implementation", "no-such", status=2).stderr)
        self.assertIn("--matrix", run("bench", "decode", "--matrix", status=2).stderr)
        self.assertIn("decode excludes --json", run("bench", "--json", "decode", status=2).stderr)
        self.assertIn("--backward", run("bench", "decode", "--backward", status=2).stderr)
        self.assertIn("decode excludes --backward", run("bench", "--backward", "decode", status=2).stderr)
        self.assertIn("--matrix", run("bench", "flex", "--matrix", status=2).stderr)
        self.assertIn("flex excludes --json", run("bench", "--json", "flex", status=2).stderr)
        self.assertIn("decode", run("bench", "flex", "decode", status=2).stderr)
        self.assertIn("no-such-function", run("bench", "flex", "--filter", "no-such-function", status=2).stderr)
        self.assertIn("cpu-engine", run("bench", "flex", "--implementation", "no-such", status=2).stderr)
        self.assertIn("no-such-cell", run("bench", "decode", "--filter", "no-such-cell", status=2).stderr)

    def test_list(self) -> None:
        names = run("verify", "--list").stdout.split()
        self.assertEqual(len(names), len(set(names)))
        self.assertEqual(names[:3], ["guide/dense-causal", "guide/varlen-gqa", "guide/paged-16-shuffled"])
        listed = json.loads(run("verify", "--list", "--json").stdout)
        self.assertEqual([case["name"] for case in listed], names)
        passes = {name.startswith("backward/"): [] for name in names}
        for case in listed:
            passes[case["name"].startswith("backward/")].append(case)
        self.assertGreater(len(passes[True]), 50)
        for backward, cases in passes.items():
            for case in cases:
                self.assertEqual({name.startswith("backward, ") for name in case["features"]}, {backward})
        self.assertIn("decode/B8-kv4096-bf16", run("bench", "--list").stdout.split())
        training = run("bench", "--backward", "--list").stdout.split()
        self.assertIn("backward/S4096-bf16", training)
        self.assertLess(set(training), set(run("bench", "--backward", "--matrix", "--list").stdout.split()))
        short, full = (run("bench", "decode", "--list", *more).stdout.split() for more in ([], ["--full"]))
        self.assertIn("64/8-D128/B4-kv2048-q1-page16-bf16", short)
        self.assertLess(set(short), set(full))
        self.assertEqual(len(full), 7 * 5 * 2 * 2 * (8 * 5 + 7 * 4))  # skewed: not one sequence, not 512 keys
        short, full = (run("bench", "flex", "--cpu", "--list", *more).stdout.split() for more in ([], ["--full"]))
        functions = ("none", "causal", "window-256", "documents-256", "prefix-256", "ALiBi", "relative", "softcap-30")
        self.assertEqual(short[:8], [f"A/{name}" for name in functions])
        self.assertEqual([len(short), len(full)], [24, 24])
        self.assertIn("B/window-1024", full)


class Doctor(unittest.TestCase):
    def test_text_has_no_colour_in_a_pipe(self) -> None:
        text = run("doctor", VIRTUAL_ENV="").stdout
        self.assertNotIn("\033", text)
        self.assertIn("cpu-engine", text)

    def test_json(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = FakeVenv(Path(folder)).doctor()
        self.assertGreaterEqual(report["machine"]["cores"], 1)
        self.assertTrue(report["machine"]["simd"])
        self.assertEqual([i["name"] for i in report["implementations"]], ["cuda", "cpu-engine", "cpu-reference"])
        self.assertGreaterEqual(len(report["problems"]), 10)
        for problem in report["problems"]:
            self.assertEqual(problem["implementation"], "cpu-engine")
            self.assertIn("required: ", problem["explanation"])
        self.assertTrue(report["healthy"])

    def test_forced_implementation_shows(self) -> None:
        report = json.loads(run("doctor", "--json", FLASHSPARK_FORCE_IMPLEMENTATION="cpu-reference").stdout)
        self.assertEqual({p["implementation"] for p in report["problems"]}, {"cpu-reference"})
        self.assertTrue(any("FLASHSPARK_FORCE_IMPLEMENTATION" in f["text"] for f in report["findings"]))

    def test_unknown_forced_implementation_is_an_error(self) -> None:
        report = json.loads(run("doctor", "--json", status=1, FLASHSPARK_FORCE_IMPLEMENTATION="no-such").stdout)
        self.assertFalse(report["healthy"])


class Verify(unittest.TestCase):
    def test_guide(self) -> None:
        if LAUNCHER:
            self.skipTest("minutes under an emulator")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.json"
            text = run("verify", "--filter", "guide/", "--implementation", "cpu-engine", "--report", str(path)).stdout
            report = json.loads(path.read_text())
        self.assertIn("PASSED", text)
        self.assertEqual(report["summary"]["passed"], 3)
        self.assertEqual(report["summary"]["failed"], 0)
        for result in report["results"]:
            self.assertEqual(result["result"], "pass")
            self.assertGreater(result["max_error"], 0)
            self.assertGreaterEqual(result["max_error"], result["rms_error"])
            self.assertLessEqual(result["error_over_bound"], 1)
            self.assertGreater(result["seconds"], 0)
        self.assertGreater(report["limits"]["fp32_gflops"], 0)
        self.assertGreater(report["limits"]["copy_gb_per_s"], 0)
        self.assertEqual(report["coverage"]["gqa"]["cpu-engine"], {"passed": 2, "failed": 0})

    def test_both_implementations_and_seed(self) -> None:
        reports = [json.loads(run("verify", "--filter", "edge/", "--json", "--seed", seed).stdout) for seed in "12"]
        for report in reports:
            self.assertEqual({r["implementation"] for r in report["results"]}, {"cpu-engine", "cpu-reference"})
        errors = [[r["rms_error"] for r in report["results"]] for report in reports]
        self.assertNotEqual(*errors)

    def test_gradients(self) -> None:
        if LAUNCHER:
            self.skipTest("minutes under an emulator")
        report = json.loads(run("verify", "--filter", "backward/mask", "--json").stdout)
        self.assertEqual(report["summary"]["failed"], 0)
        self.assertEqual(report["summary"]["passed"], 2 * report["summary"]["cases"])
        for result in report["results"]:
            self.assertGreaterEqual(result["max_error"], result["rms_error"])
            self.assertLessEqual(result["error_over_bound"], 1)
        engine = [result for result in report["results"] if result["implementation"] == "cpu-engine"]
        self.assertGreater(sum(result["max_error"] > 0 for result in engine), len(engine) / 2)
        for feature in ("causal", "gqa", "window_left", "sinks", "rel_logits", "alibi", "softcap", "varlen kv"):
            self.assertGreater(report["coverage"]["backward, " + feature]["cpu-engine"]["passed"], 0, feature)

    def test_unwritable_report_fails(self) -> None:
        run("verify", "--filter", "edge/one-key", "--report", "/nonexistent/report.json", status=1)


class Bench(unittest.TestCase):
    def test_plot_and_json(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder) / "plot.svg"
            arguments = ["--filter", "prefill/S128", "--seconds", "0.05", "--plot", str(plot), "--json"]
            report = json.loads(run("bench", *arguments).stdout)
            root = ElementTree.fromstring(plot.read_text())
        self.assertTrue(root.tag.endswith("svg"))
        self.assertEqual(len(report["results"]), 2)
        for result in report["results"]:
            self.assertGreaterEqual(result["calls"], 5)
            self.assertLessEqual(result["fastest_seconds"], result["median_seconds"])
            self.assertLess(result["of_limit"], 1.5)

    def test_gradients(self) -> None:
        arguments = ["bench", "--backward", "--filter", "S1024-bf16", "--seconds", "0.05"]
        (result,) = json.loads(run(*arguments, "--json").stdout)["results"]
        self.assertEqual(result["implementation"], "cpu-engine")
        self.assertEqual(result["flops"], 2.5 * 2 * 16 * (1024 * 1025 / 2) * 256)
        self.assertEqual(result["bytes"], 2 * 2 * 2 * 1024 * 128 * (16 + 8))
        self.assertGreaterEqual(result["calls"], 5)
        self.assertGreater(result["median_seconds"], 0)
        self.assertRegex(run(*arguments).stdout, r"backward/S1024-bf16 +cpu-engine +\d")

    def test_decode(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder) / "plot.svg"
            arguments = ["bench", "decode", "--filter", "16/2-D128/B1-kv", "--seconds", "0.01"]
            report = json.loads(run(*arguments, "--plot", str(plot), "--json").stdout)
            root = ElementTree.fromstring(plot.read_text())
        names = [f"16/2-D128/B1-kv{keys}-q1-page16-bf16" for keys in (512, 2048)]
        self.assertEqual([result["case"]["name"] for result in report["results"]], names)
        self.assertEqual(sum(element.tag.endswith("circle") for element in root.iter()), 2)
        for result, keys in zip(report["results"], (512, 2048)):
            self.assertEqual(result["implementation"], "cpu-engine")
            self.assertEqual(result["bytes"], 2 * 2 * 128 * (2 * keys + 16))
            self.assertEqual(result["flops"], 4 * 128 * 16 * keys)
            self.assertGreaterEqual(result["calls"], 5)
            self.assertGreater(result["of_copy_bandwidth"], 0)
        one, two = (result["median_seconds"] for result in report["results"])
        growth = report["largest_growth"]
        self.assertEqual([growth["from"], growth["to"]], names)
        self.assertAlmostEqual(growth["factor"], (two / one) ** 0.5)
        text = run(*arguments).stdout
        self.assertRegex(text, names[0] + r" +\d+\.\d +")
        self.assertIn("largest growth of time for twice the work: ", text)

    def test_flex(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder) / "plot.svg"
            arguments = ["bench", "flex", "--cpu", "--filter", "A/", "--seconds", "0.01"]
            report = json.loads(run(*arguments, "--plot", str(plot), "--json").stdout)
            root = ElementTree.fromstring(plot.read_text())
        self.assertTrue(root.tag.endswith("svg"))
        results = {result["case"]["name"].removeprefix("A/"): result for result in report["results"]}
        self.assertEqual(len(results), 8)
        tokens, width, rows = 1024, 256, range(1024)
        causal = tokens * (tokens + 1) // 2
        pairs = dict.fromkeys(results, causal)
        pairs["window-256"] = sum(min(row, width) + 1 for row in rows)
        pairs["documents-256"] = sum(row % width + 1 for row in rows)
        pairs["prefix-256"] = sum(max(row + 1, width) for row in rows)
        for name, result in results.items():
            self.assertEqual(result["implementation"], "cpu-engine")
            self.assertEqual(result["flops"], 4 * 4 * 128 * pairs[name], name)
            self.assertEqual(result["bytes"], 2 * 2 * tokens * 128 * (4 + 1))
            self.assertGreaterEqual(result["calls"], 5)
            self.assertGreater(result["first_seconds"], 0)
            self.assertGreater(result["of_plain"], 0)
        self.assertEqual(results["none"]["of_plain"], 1)
        # Documents are a quarter of the pairs.
        self.assertLess(results["documents-256"]["median_seconds"], results["causal"]["median_seconds"])
        text = run(*arguments[:-4], "--filter", "A/ALiBi", "--seconds", "0.01").stdout  # the plain kernel is timed, too
        self.assertRegex(text, r"A/ALiBi +cpu-engine +.*\d\.\d\d\n")


@unittest.skipUnless(FAKE_CUDA, "built without CUDA kernels")
class Gpu(unittest.TestCase):
    """With a driver whose GPU computes nothing: which device runs what, and that wrong results are detected."""

    ENVIRONMENT: ClassVar[dict[str, str]] = {"LD_LIBRARY_PATH": FAKE_CUDA}

    def test_doctor(self) -> None:
        self.assertIn("the GPU takes sm_120f", run("doctor", **self.ENVIRONMENT).stdout)
        problems = json.loads(run("doctor", "--json", **self.ENVIRONMENT).stdout)["problems"]
        on_gpu = {problem["problem"]: problem["gpu_implementation"] for problem in problems}
        self.assertEqual(on_gpu["decode, paged, bf16"], "cuda")
        self.assertIsNone(on_gpu["prefill, f32"])
        self.assertEqual({problem["implementation"] for problem in problems}, {"cpu-engine"})

    def test_verify_sees_that_nothing_was_computed(self) -> None:
        arguments = ["verify", "--filter", "guide/varlen", "--json"]
        report = json.loads(run(*arguments, status=1, **self.ENVIRONMENT).stdout)
        results = {result["implementation"]: result["result"] for result in report["results"]}
        self.assertEqual(results, {"cuda": "FAIL", "cpu-engine": "pass", "cpu-reference": "pass"})
        self.assertEqual(report["gpu"]["kernels"], "sm_120f")
        report = json.loads(
            run("verify", "--filter", "backward/layout/dense-strided", "--json", status=1, **self.ENVIRONMENT).stdout
        )
        results = {result["implementation"]: result["result"] for result in report["results"]}
        self.assertEqual(results, {"cuda": "FAIL", "cpu-engine": "pass", "cpu-reference": "pass"})
        report = json.loads(run(*arguments, "--cpu", **self.ENVIRONMENT).stdout)
        self.assertNotIn("cuda", {result["implementation"] for result in report["results"]})

    def test_bench(self) -> None:
        arguments = ["bench", "--filter", "prefill/S128", "--seconds", "0.01", "--json"]
        results = json.loads(run(*arguments, **self.ENVIRONMENT).stdout)["results"]
        self.assertEqual([result.get("implementation") for result in results], ["cuda", None])
        self.assertIn("lacks float32", results[1]["error"])
        self.assertAlmostEqual(results[0]["median_seconds"], 1e-3)
        arguments[1:1] = ["--backward"]
        arguments[arguments.index("prefill/S128")] = "S1024-"
        results = json.loads(run(*arguments, **self.ENVIRONMENT).stdout)["results"]
        by_name = {result["case"]["name"].split("/")[1]: result.get("implementation") for result in results}
        self.assertEqual((by_name["S1024-bf16"], by_name["S1024-f32"]), ("cuda", None))
        results = json.loads(run(*arguments, "--implementation", "cpu-engine", **self.ENVIRONMENT).stdout)["results"]
        self.assertEqual({result["implementation"] for result in results}, {"cpu-engine"})

    def test_bench_decode(self) -> None:
        arguments = ["bench", "decode", "--seconds", "0.01", "--json", "--filter"]
        report = json.loads(run(*arguments, "B16-kv8192-q1-page", **self.ENVIRONMENT).stdout)
        self.assertEqual({result["implementation"] for result in report["results"]}, {"cuda"})
        self.assertEqual({result["median_seconds"] for result in report["results"]}, {1e-3})
        self.assertEqual(len(report["results"]), 7 + 3 + 3)  # every head configuration; pages of 64; e4m3
        growth = json.loads(run(*arguments, "64/8-D128/B1-kv", **self.ENVIRONMENT).stdout)["largest_growth"]
        self.assertEqual(growth["factor"], 1)
        large = ["64/8-D128/B128-kv131072-q1-page16-bf16", "--full"]
        (result,) = json.loads(run(*arguments, *large, **self.ENVIRONMENT).stdout)["results"]
        self.assertIn("68.7 GB", result["error"])
        arguments.remove("--json")
        self.assertRegex(run(*arguments, *large, **self.ENVIRONMENT).stdout, large[0] + " +does not fit")
        report = run(*arguments, "16/2-D128/B1-kv2048", "--cpu", "--json", **self.ENVIRONMENT).stdout
        self.assertEqual({result["implementation"] for result in json.loads(report)["results"]}, {"cpu-engine"})

    def test_bench_flex(self) -> None:
        arguments = ["bench", "flex", "--seconds", "0.01", "--json", "--filter", "B/none"]
        (result,) = json.loads(run(*arguments, **self.ENVIRONMENT).stdout)["results"]
        self.assertEqual([result["implementation"], result["of_plain"]], ["cuda", 1])
        self.assertEqual(result["flops"], 4 * 16 * 64 * 8192 * 8193 // 2)
        (result,) = json.loads(run(*arguments, "--cpu", **self.ENVIRONMENT).stdout)["results"]
        self.assertEqual([result["implementation"], result["flops"]], ["cpu-engine", 4 * 4 * 64 * 2048 * 2049 // 2])

    def test_only_for_a_gpu_without_one(self) -> None:
        text = run("verify", "--implementation", "cuda", "--cpu", status=2, **self.ENVIRONMENT).stderr
        self.assertIn("cuda cannot run here: --cpu", text)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
