"""Runs and counts the tests of one stage of run_tests.py: programs of several test frameworks, including every skipped
test.

A skipped test is reported with its reason at the end of the run, and counts as a failure unless allowed_skips.txt lists
it.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
JOBS = os.cpu_count() or 2
ALLOWED = Path(__file__).with_name("allowed_skips.txt")


class Failed(Exception):
    """A check failed; the text says which."""


def allowed_skips(path: Path = ALLOWED) -> list[tuple[str, str, str]]:
    """The stage, test pattern and reason of each line."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    words = [tuple(part.strip() for part in line.split("|", 2)) for line in lines if line and not line.startswith("#")]
    if wrong := [line for line in words if len(line) != 3]:
        raise Failed(f"{path.name}: not stage | place | reason: {wrong[0]}")
    return words


@dataclass
class Log:
    """The tests and counts of one stage. Commands append to the stage's log file."""

    path: Path
    passed: int = 0
    failed: int = 0
    skips: list[tuple[str, str]] = field(default_factory=list)  # test, and the reason as its program reports it
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards the counts, as programs may run concurrently

    def run(self, *command: str | Path, cwd: Path = ROOT, check: bool = True, env: dict[str, str] | None = None) -> str:
        words = [str(word) for word in command]
        result = subprocess.run(
            words,
            cwd=cwd,
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        with self.lock, self.path.open("a") as log:
            log.write(f"$ {' '.join(words)}\n{result.stdout}\n")
        if check and result.returncode != 0:
            raise Failed(f"{words[0]} ended with {result.returncode}")
        return result.stdout

    def check(self, holds: bool, what: str) -> None:
        """A check of the stage itself."""
        with self.lock:
            if holds:
                self.passed += 1
            else:
                self.failed += 1
                self.failures.append(what)

    def skip(self, where: str, reason: str) -> None:
        """Records something that the stage leaves out."""
        with self.lock:
            self.skips.append((where, reason))

    def add(self, passed: int, failed: int, failures: list[str], skips: list[tuple[str, str]]) -> None:
        with self.lock:
            self.passed += passed
            self.failed += failed
            self.failures += failures
            self.skips += skips

    def judge_skips(self, stage: str, allowed: list[tuple[str, str, str]]) -> None:
        """Skips that are not on the list are failures, and so is a stage that ran and skipped no test."""
        for where, reason in self.skips:
            if not any(stage == s and fnmatchcase(where, place) and reason == why for s, place, why in allowed):
                self.failed += 1
                self.failures.append(f"left out, and not in {ALLOWED.name}: {stage} | {where} | {reason}")
        if self.passed + self.failed == 0 and not self.skips:
            self.failed += 1
            self.failures.append("the stage ran no tests")

    def gtest(self, *command: str | Path, env: dict[str, str] | None = None) -> None:
        name = Path(str(command[0])).name
        self.add(*read_gtest(name, self.run(*command, check=False, env=env)))

    def gtest_parts(self, *command: str | Path, env: dict[str, str] | None = None) -> list[Callable[[], None]]:
        """The tests of one program in parts, one per core: tasks that together() runs."""
        shards = [{"GTEST_TOTAL_SHARDS": str(JOBS), "GTEST_SHARD_INDEX": str(n)} | (env or {}) for n in range(JOBS)]
        return [partial(self.gtest, *command, env=shard) for shard in shards]

    def together(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Runs them on all cores, in this order: the longest should come first. All of them run, even if one fails."""
        with ThreadPoolExecutor(JOBS) as pool:
            running = [pool.submit(task) for task in tasks]
        for task in running:
            task.result()

    def pytest(self, *command: str | Path, env: dict[str, str] | None = None) -> None:
        self.add(*read_pytest(self.run(*command, "-qrs", check=False, env=env)))

    def unittests(self, *command: str | Path) -> None:
        self.add(*read_unittests(self.run(*command, check=False), 1))

    def ctest(self, *command: str | Path) -> None:
        """Runs Python programs that use unittest, one per core; ctest numbers the lines of each."""
        out = self.run(*command, "-V", "-j", str(JOBS), check=False)
        programs = re.search(r"(\d+) tests? failed out of (\d+)", out)
        if not programs or int(programs[2]) == 0:
            raise Failed("ctest ran no tests")
        counts = read_unittests(program_by_program(out), int(programs[2]))
        if int(programs[1]) and counts[1] == 0:
            raise Failed(f"ctest: {programs[0]}, without a test that failed")
        self.add(*counts)

    def summary(self, out: str, program: str, failure: str) -> None:
        """Reads the final line "N passed, N failed" of our own programs; `failure` finds the names of failures."""
        counts = re.search(r"^(\d+) passed, (\d+) failed$", out, re.M)
        if not counts:
            raise Failed(f"{program} did not finish")
        self.add(int(counts[1]), int(counts[2]), re.findall(failure, out, re.M), [])

    def preset(self, name: str, *targets: str) -> Path:
        self.run("cmake", "--preset", name)
        self.run("cmake", "--build", "--preset", name, "-j", str(JOBS), *(["--target", *targets] if targets else []))
        return BUILD / name


Counts = tuple[int, int, list[str], list[tuple[str, str]]]  # passed, failed, failures, skips


def read_gtest(name: str, out: str) -> Counts:
    ran = re.search(r"\[=+\] (\d+) tests? from \d+ test suites? ran", out)
    passed = re.search(r"\[  PASSED  \] (\d+) test", out)
    if not ran or not passed:
        raise Failed(f"{name} did not finish")
    if int(ran[1]) == 0:
        raise Failed(f"{name} ran no tests")
    skips = [
        (test, " ".join(re.sub(r"^\S+:\d+: Skipped$", "", text, flags=re.M).split()))
        for _, text, test in re.findall(r"\[ RUN      \] (\S+)\n((?:(?!\[ RUN).*\n)*?)\[  SKIPPED \] (\S+) \(", out)
    ]
    found = re.search(r"\[  SKIPPED \] (\d+) test", out)
    if (int(found[1]) if found else 0) != len(skips):
        raise Failed(f"{name}: {found[0] if found else 'no'} skipped tests, of which {len(skips)} say why")
    failed = int(ran[1]) - int(passed[1]) - len(skips)
    if disabled := re.search(r"YOU HAVE (\d+) DISABLED TEST", out):
        skips.append((name, f"{disabled[1]} disabled"))
    return int(passed[1]), failed, re.findall(r"\[  FAILED  \] ([^\s,]+)(?:, where .*)? \(\d+ ms", out), skips


def read_pytest(out: str) -> Counts:
    summary = out.strip().splitlines()[-1] if out.strip() else ""
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", summary)}
    if not counts.get("passed"):
        raise Failed(f"pytest: {summary or 'no output'}")
    skips = []
    for count, where, reason in re.findall(r"^SKIPPED \[(\d+)\] (.*?)(?::\d+)?: (.*)$", out, re.M):
        skips += [(where, reason)] * int(count)
    if len(skips) != counts.get("skipped", 0):
        raise Failed(f"pytest: {counts.get('skipped', 0)} skipped tests, of which {len(skips)} say why")
    skips += [("pytest", f"{counts[kind]} {kind}") for kind in ("deselected", "xfailed", "xpassed") if kind in counts]
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    return counts["passed"], failed, re.findall(r"^(?:FAILED|ERROR) (\S+)", out, re.M), skips


def program_by_program(out: str) -> str:
    """What the programs of one ctest -V -j wrote, whose lines bear their numbers and are mixed, without these."""
    lines = sorted(re.findall(r"^(\d+): (.*)", out, re.M), key=lambda line: int(line[0]))
    return "".join(f"{text}\n" for _, text in lines)


def read_unittests(out: str, programs: int) -> Counts:
    """Reads the output of `programs` programs that use unittest and list each test."""
    runs = [int(n) for n in re.findall(r"^Ran (\d+) tests?", out, re.M)]
    if len(runs) != programs or 0 in runs:
        raise Failed(f"{programs} programs of unittest ran {runs} tests")
    skips = re.findall(r"^(\w+ \(\S+\))(?:\n.*)?? \.\.\. skipped ['\"](.*)['\"]$", out, re.M)
    if len(skips) != sum(int(n) for n in re.findall(r"skipped=(\d+)", out)):
        raise Failed(f"unittest: skipped tests, of which {len(skips)} say why")
    names = re.findall(r"^(?:FAIL|ERROR|UNEXPECTED SUCCESS): (.*)", out, re.M)
    # Each failing subtest of a test is reported separately.
    failed = {name.split(")")[0] for name in names}
    return sum(runs) - len(skips) - len(failed), len(failed), names, skips
