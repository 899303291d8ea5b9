"""Every option with every kind of wrong value; unwritable output; terminals. Driven by one table of options."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import ClassVar

from program import LAUNCHER, PROGRAM, run

CASE = ("--filter", "edge/one-key")
FLEX = ("--filter", "A/documents", "--seconds", "0.01")
CELL = ("--filter", "16/2-D128/B1-kv512-q1-page16-bf16", "--seconds", "0.01")

# Subcommand -> option -> kind of value. The help must list exactly these.
COMMON = {"--filter": "text", "--implementation": "text", "--threads": "threads", "--seed": "seed", "--cpu": "flag"}
SHOWN = {"--list": "flag", "--json": "flag", "--help": "help"}
BENCH = {**COMMON, **SHOWN, "--seconds": "seconds", "--plot": "path"}
OPTIONS = {
    (): {"--version": "help", "--help": "help"},
    ("doctor",): {"--json": "flag", "--bandwidth": "flag", "--verbose": "flag", "--help": "help"},
    ("verify",): {**COMMON, **SHOWN, "--report": "path", "--verbose": "flag", "--vllm": "flag"},
    ("bench",): {**BENCH, "--matrix": "flag", "--backward": "flag"},
    ("bench", "decode"): {**BENCH, "--full": "flag"},
    ("bench", "flex"): {**BENCH, "--full": "flag"},
    ("uninstall",): {"--help": "help"},
}
NOT_NUMBERS = [
    "",
    " ",
    "x",
    "nan",
    "-nan",
    "NaN",
    "nan(1)",
    "inf",
    "-inf",
    "infinity",
    "1e999",
    "-1",
    "-0.5",
    "+1",
    " 1",
]
NOT_NUMBERS += ["1 ", "1x", "1,5", "0x10", "1_000", "1'000", "1e", "--", "१", "1\n", "9" * 23, "-" + "9" * 23]
WRONG = {
    "threads": [*NOT_NUMBERS, "1025", "2147483648", "4294967297", "18446744073709551617", "1.0", "1e2"],
    "seed": [*NOT_NUMBERS, "18446744073709551616", "1.0", "1e2"],
    "seconds": [*NOT_NUMBERS, "0", "0.0", "0.00999", "1e-400", "600.1", "1e3"],
    "path": [""],
    "text": [""],
    "help": [],
    "flag": ["0", "2", "false", "nan", "maybe"],
}
RIGHT = {
    "threads": ["0", "1", "010", "1024"],
    "seed": ["0", "7", "18446744073709551615"],
    "seconds": ["0.01", "1", "6e2", "600"],
}
# Commands that print to standard output and are quick.
PRINTS = [
    ("--version",),
    ("--help",),
    ("doctor",),
    ("doctor", "--json"),
    ("doctor", "--verbose"),
    ("verify", "--help"),
    ("verify", "--list"),
    ("verify", "--list", "--json"),
    ("verify", *CASE),
    ("verify", *CASE, "--verbose"),
    ("verify", *CASE, "--json"),
    ("bench", "--list"),
    ("bench", "--list", "--matrix", "--json"),
    ("bench", "--filter", "prefill/S128", "--seconds", "0.01"),
    ("bench", "--filter", "prefill/S128", "--seconds", "0.01", "--json"),
    ("bench", "--backward", "--list", "--json"),
    ("bench", "decode", "--list", "--full"),
    ("bench", "decode", *CELL),
    ("bench", "decode", *CELL, "--json"),
    ("bench", "flex", "--list", "--full"),
    ("bench", "flex", *FLEX),
    ("bench", "flex", *FLEX, "--json"),
    ("uninstall",),
    ("uninstall", "--help"),
]


class Options(unittest.TestCase):
    def test_the_table_is_complete(self) -> None:
        for command, options in OPTIONS.items():
            lines = run(*command, "--help").stdout
            found = re.findall(r"^  (?:-\w,)?(--[a-z]+)", lines, re.M)
            self.assertEqual(sorted(found), sorted(options), command)

    def test_wrong_values(self) -> None:
        for command, options in OPTIONS.items():
            for option, kind in options.items():
                for value in WRONG[kind]:
                    with self.subTest(command=command, option=option, value=value):
                        result = run(*command, f"{option}={value}", status=2)
                        self.assertEqual(result.stdout, "")
                        self.assertIn(option.strip("-"), result.stderr)

    def test_right_values(self) -> None:
        for command, options in OPTIONS.items():
            for option, kind in options.items():
                for value in RIGHT.get(kind, []):
                    with self.subTest(command=command, option=option, value=value):
                        run(*command, "--list", option, value)

    def test_options_without_a_value_or_given_twice(self) -> None:
        for command, options in OPTIONS.items():
            for option, kind in options.items():
                if kind in {"flag", "help"}:
                    continue
                with self.subTest(command=command, option=option):
                    run(*command, option, status=2)
                    value = RIGHT.get(kind, ["a"])[0]
                    run(*command, "--list", option, value, option, value, status=2)

    def test_numbers_are_decimal(self) -> None:
        twice = [run("verify", "--list", "--json", "--seed", seed).stdout for seed in ("010", "10")]
        self.assertEqual(*twice)


class Files(unittest.TestCase):
    """An unwritable file is an error, reported before any work starts where that is possible."""

    WRITERS = (
        ("verify", *CASE, "--report"),
        ("bench", "--filter", "prefill/S128", "--seconds", "0.01", "--plot"),
        ("bench", "decode", *CELL, "--plot"),
        ("bench", "flex", *FLEX, "--plot"),
    )

    def test_errors(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for words in self.WRITERS:
                for path in (folder, f"{folder}/none/x", "/dev/full", f"{folder}/{'x' * 300}", "/proc/self/mem/x"):
                    for more in ([], ["--json"]):
                        with self.subTest(words=words, path=path, more=more):
                            result = run(*words, path, *more, status=1)
                            self.assertIn(f"cannot write {path}: ", result.stderr)
                with self.subTest(words=words):
                    run(*words, f"{folder}/x", "--list", status=2)  # would write nothing
                    run(*words, f"{folder}/right")
                    self.assertGreater(Path(folder, "right").stat().st_size, 100)


class Output(unittest.TestCase):
    """Output that cannot be written is an error of every subcommand."""

    def shell(self, redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        script = f'"$@" {redirection}'
        command = ["bash", "-c", script, "bash", *LAUNCHER, PROGRAM, *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def test_full_or_closed(self) -> None:
        for arguments in PRINTS:
            for redirection in (">/dev/full", ">&-"):
                with self.subTest(arguments=arguments, redirection=redirection):
                    result = self.shell(redirection, *arguments)
                    self.assertEqual(result.returncode, 1, result.stderr)
                    self.assertEqual(result.stderr.count("cannot write to standard output: "), 1)
                    self.assertEqual(result.stderr.count("\n"), 1, result.stderr)

    def test_closed_output_does_not_go_into_the_report(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            result = self.shell(">&-", "verify", *CASE, "--report", f"{folder}/report.json")
            self.assertEqual(result.returncode, 1)
            self.assertNotIn("PASSED", Path(folder, "report.json").read_text())

    def test_wrong_usage_stays_2(self) -> None:
        for redirection in (">/dev/full", ">&-", "2>&-", ">&- 2>&-"):
            self.assertEqual(self.shell(redirection, "nonsense").returncode, 2)

    def test_a_reader_that_leaves(self) -> None:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):  # dispositions that a caller may pass on
            command = [*LAUNCHER, PROGRAM, "bench", "decode", "--list", "--full"]
            before = signal.signal(signal.SIGPIPE, handler)
            try:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, restore_signals=False
                )
            finally:
                signal.signal(signal.SIGPIPE, before)
            with process:
                process.stdout.readline()
                process.stdout.close()
                self.assertEqual(process.stderr.read(), b"")
                self.assertEqual(process.wait(), -signal.SIGPIPE)


class Switches(unittest.TestCase):
    """A meaningless value of an environment variable is reported, and nothing runs."""

    WRONG: ClassVar = {
        "FLASHSPARK_FORCE_IMPLEMENTATION": ["no-such", "cpu", "CPU-ENGINE", "cpu-engine "],
        "FLASHSPARK_CPU_TARGET": ["no-such", "AVX9", "AVX-512x", "SSE4 "],
        "FLASHSPARK_NUM_THREADS": ["many", "-1", "2x", "1.5", "nan", "1e3", "9" * 23],
        "FLASHSPARK_CHECK": ["maybe", "2", "-1", "1x"],
    }
    COMMANDS = (
        ("verify", *CASE),
        ("bench", "--filter", "S128", "--seconds", "0.01"),
        ("bench", "decode", *CELL),
        ("bench", "flex", *FLEX),
    )

    def test_commands(self) -> None:
        for name, values in self.WRONG.items():
            for value in values:
                for command in self.COMMANDS:
                    with self.subTest(name=name, value=value, command=command):
                        result = run(*command, status=2, **{name: value})
                        self.assertEqual(result.stdout, "")
                        self.assertIn(value, result.stderr)

    def test_doctor(self) -> None:
        for name, values in {**self.WRONG, "FLASHSPARK": ["maybe", "2", "yes please"]}.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    self.assertIn(value, run("doctor", status=1, VIRTUAL_ENV="", **{name: value}).stdout)

    def test_doctor_lists_them(self) -> None:
        text = run("doctor", VIRTUAL_ENV="").stdout
        for name in ("FORCE_IMPLEMENTATION", "CPU_TARGET", "NUM_THREADS", "CHECK", "CAPABILITIES"):
            self.assertIn(f"FLASHSPARK_{name} ", text)


def on_a_terminal(*arguments: str, **environment: str) -> bytes:
    """Runs the program with both output streams on a terminal; returns what it printed."""
    ours, theirs = os.openpty()
    environment = {"PATH": os.environ["PATH"], **environment}
    process = subprocess.Popen([*LAUNCHER, PROGRAM, *arguments], env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        try:
            if select.select([ours], [], [], 0.1)[0]:
                text += os.read(ours, 65536)
        except OSError:  # the other side has closed
            break
    process.wait()
    os.close(ours)
    return text


class Terminal(unittest.TestCase):
    PLAIN = ({"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": ""}, {})

    def test_no_escape_sequences(self) -> None:
        cases = [(arguments, {"TERM": "dumb"}) for arguments in (*PRINTS, ("nonsense",))]
        cases += [(("verify", "--filter", "edge/"), environment) for environment in self.PLAIN]
        cases += [(("doctor",), environment) for environment in self.PLAIN]
        for arguments, environment in cases:
            with self.subTest(arguments=arguments, environment=environment):
                text = on_a_terminal(*arguments, **environment)
                self.assertTrue(text.strip())
                self.assertNotIn(b"\033", text)

    def test_colours_and_progress_where_somebody_looks(self) -> None:
        text = on_a_terminal("verify", "--filter", "edge/", TERM="xterm", NO_COLOR="")
        self.assertIn(b"\033[32m", text)
        self.assertIn(b"\r\033[K", text)

    def test_a_dumb_terminal_gets_no_progress(self) -> None:
        self.assertNotIn("━".encode(), on_a_terminal("verify", "--filter", "edge/", TERM="dumb"))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
