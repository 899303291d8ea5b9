"""Plants the faults of mutants.toml in the kernels, one at a time, and sees whether the emulator finds each.

usage: mutants.py [--build build/emulator] [--sample 6 --seed 1] [--only TEXT] [--table FILE]

The build folder is configured (preset `emulator`); what a mutant links with is brought up to date first. The exit
status is 1 if a mutant survives that is not marked as one that should, or is found though it is.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WORK = ROOT / "build/mutants"
JOBS = 2
CASES = 300  # of the fuzz, for each mutant
SECONDS = 120  # the fuzz ends itself then; what runs for twice as long hangs

# What a failure looks like, the first that is found; a race is also a wrong value, and is called a race.
DETECTORS = [
    (r": race: ", "race"),
    (r"copy in flight", "copy in flight"),
    (r"AddressSanitizer|poisoned", "address sanitizer"),
    (r"runtime error:", "undefined-behaviour sanitizer"),
    (r"uninitialised", "shared memory uninitialised"),
    (r"out of bounds|misaligned", "shared memory out of bounds"),
    (r"divergence|exits while|which has exited|uniform of|lowest_bit", "warp divergence"),
    (r"bank conflicts", "bank conflicts"),
    (r"wrote outside", "wrote outside the rows in use"),
    (r"NaN or infinity where", "NaN"),
    (r"of the bound|, should be ", "wrong values"),
    (r"\[  FAILED  \]", "count of work"),
]


FUZZ, FORWARD, WILD = "emulator_fuzz", "emulator_forward_test", "emulator_wild_test"
FUNCTIONS = "emulator_functions_test"  # of kernels whose names begin with functions/
BACKWARD = "emulator_backward_test"  # with backward_
BACKWARD_FUNCTIONS = "emulator_backward_functions_test"  # with functions/backward_
# The objects whose compiler line a mutant's kernels get.
KERNELS = {
    FUNCTIONS: "emulator_function_kernels.dir",
    BACKWARD: "emulator_backward_kernels.dir",
    BACKWARD_FUNCTIONS: "emulator_backward_function_kernels.dir",
}
# What runs the other kernels of an operation, which are built with the fault, too.
HARNESS = {
    BACKWARD: ["backward/problem.cpp"],
    BACKWARD_FUNCTIONS: ["backward/problem.cpp", "backward/functions.cpp", "backward/exact_sums_test.cpp"],
}


@dataclass
class Mutant:
    name: str
    file: str
    old: str
    new: str
    kernels: list[str] = field(default_factory=lambda: ["d64_short_q_bf16_sm_120f"])
    test: str = ""
    survives: str = ""


@dataclass
class Outcome:
    mutant: Mutant
    caught_by: str  # empty: survived
    seed: str = ""
    detail: str = ""
    seconds: float = 0

    def as_wanted(self) -> bool:
        return bool(self.caught_by) != bool(self.mutant.survives)


class Broken(Exception):
    """The mutant cannot be made: its text is gone, or what it becomes does not compile."""


def planted(text: str, mutant: Mutant) -> str:
    """The file with the fault. Comments may have moved with the formatting, so any blanks match any."""
    pattern = r"\s+".join(re.escape(word) for word in mutant.old.split())
    places = list(re.finditer(pattern, text))
    if len(places) != 1:
        raise Broken(f"{mutant.name}: its text occurs {len(places)} times in {mutant.file}, not once: {mutant.old}")
    return text[: places[0].start()] + mutant.new + text[places[0].end() :]


class Build:
    """The configured build folder: how it compiles and links its programs, learnt from ninja."""

    def __init__(self, folder: Path, programs: list[str]) -> None:
        self.folder, self.programs = folder, programs
        subprocess.run(["ninja", "-C", folder, *programs], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(WORK, ignore_errors=True)
        shutil.copytree(ROOT / "kernels", WORK / "kernels")  # others may edit theirs meanwhile
        self.compile_line = {
            name: [*self.command(KERNELS.get(name, "emulator_kernels.dir"), "-c"), f"-I{ROOT}/tests"]
            for name in programs
        }
        self.link_line = {name: self.command(f"-o tests/emulator/{name}", "") for name in programs}

    def command(self, *needed: str) -> list[str]:
        listed = subprocess.check_output(["ninja", "-C", self.folder, "-t", "commands", *self.programs], text=True)
        for line in listed.splitlines():
            if all(text in line for text in needed):
                words = shlex.split(line)
                # The compiler is the first word that is one: ccache and the shell's `:` stand before it.
                start = next(n for n, word in enumerate(words) if re.search(r"(clang\+\+|g\+\+|c\+\+)(-\d+)?$", word))
                return [word for word in words[start:] if word not in ("&&", ":")]
        raise Broken(f"{self.folder}: no command with {needed}")

    def run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise Broken(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")

    def compile(self, program: str, source: Path, kernels: Path, to: Path) -> Path:
        words, line = [], iter(self.compile_line[program])
        for word in line:
            if word in ("-o", "-c", "-MF", "-MT"):
                next(line)
            elif word != "-MD":
                words.append(f"-I{kernels}" if word == f"-I{ROOT}/kernels" else word)
        self.run([*words, "-o", str(to), "-c", str(source)])
        return to

    def link(self, program: str, objects: list[Path], to: Path) -> None:
        harness = "|".join(re.escape(name) + r"\.o" for name in HARNESS.get(program, ["harness"]))
        left_out = rf"emulator_(backward_)?(function_)?kernels\.dir|{harness}"
        words = [word for word in self.link_line[program] if not re.search(left_out, word)]
        at = words.index("-o")
        words[at + 1] = str(to)
        # Before all others: of an inline function that several objects have, the linker takes the first, and those of
        # the tests and of the harness in the library belong to the unchanged kernels.
        self.run([words[0], *(str(item) for item in objects), *words[1:]])

    def make(self, folder: Path, kernels: Path, names: list[str], program: str) -> Path:
        objects = []
        for name in names:
            source = self.folder / f"tests/emulator/{name}.cpp"  # written by CMake
            if not source.exists():
                raise Broken(f"{name}: the emulator has no such kernel (tests/emulator/CMakeLists.txt)")
            objects.append(self.compile(program, source, kernels, folder / f"{Path(name).name}.o"))
        # The combine kernel is part of the harness.
        for number, harness in enumerate(HARNESS.get(program, ["attention/harness.cpp"])):
            objects.append(self.compile(program, HERE / harness, kernels, folder / f"harness{number}.o"))
        self.link(program, objects, folder / program)
        return folder / program


def program_of(mutant: Mutant) -> str:
    if mutant.kernels and mutant.kernels[0].startswith("functions/backward_"):
        return BACKWARD_FUNCTIONS
    if mutant.kernels and mutant.kernels[0].startswith("functions/"):
        return FUNCTIONS
    if mutant.kernels and mutant.kernels[0].startswith("backward_"):
        return BACKWARD
    if not mutant.test:
        return FUZZ
    return WILD if "Wild" in mutant.test else FORWARD


def command_of(program: Path, mutant: Mutant) -> list[str]:
    if mutant.test:
        return [str(program), f"--gtest_filter={mutant.test}"]
    if program.name == FUNCTIONS:
        return [str(program), "--gtest_filter=*EveryFunctionKernel*"]
    limits = ["--count", str(CASES), "--seconds", str(SECONDS), "--failures", "1"]
    return [str(program), *limits, *(word for name in mutant.kernels for word in ("--kernel", name))]


def expect_tests(mutant: Mutant, output: str) -> None:
    if mutant.test and not re.search(r"Running [1-9]\d* test", output):
        raise Broken(f"{mutant.name}: no test is called {mutant.test}")


def judge(mutant: Mutant, output: str, status: int) -> Outcome:
    if status == 0:
        return Outcome(mutant, "")
    seed = re.search(r"FAILED seed (\d+)", output)
    report = re.search(r"^(FAILED .*|.*runtime error.*|SUMMARY: .*)$", output, re.M)
    by = next((name for pattern, name in DETECTORS if re.search(pattern, output)), "crash")
    return Outcome(mutant, by, seed[1] if seed else "", report[1] if report else output[-300:])


def try_one(build: Build, mutant: Mutant, number: int) -> Outcome:
    start = time.monotonic()
    folder = WORK / f"{number:03}"
    kernels = folder / "kernels"
    shutil.copytree(WORK / "kernels", kernels)
    file = kernels / mutant.file
    file.write_text(planted(file.read_text(), mutant))
    program = build.make(folder, kernels, mutant.kernels, program_of(mutant))
    try:
        done = subprocess.run(
            command_of(program, mutant),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=2 * SECONDS,
        )
        (folder / "output.txt").write_text(done.stdout)
        expect_tests(mutant, done.stdout)
        outcome = judge(mutant, done.stdout, done.returncode)
    except subprocess.TimeoutExpired:
        outcome = Outcome(mutant, "does not end")
    outcome.seconds = time.monotonic() - start
    for item in [*folder.glob("*.o"), program]:
        item.unlink()
    return outcome


def unchanged_pass(build: Build, mutants: list[Mutant]) -> None:
    """A mutant is found only if the kernels without it pass the same run."""
    folder = WORK / "unchanged"
    folder.mkdir()
    of_functions = any(program_of(mutant) == FUNCTIONS for mutant in mutants)
    names = sorted({name for mutant in mutants if program_of(mutant) == FUZZ for name in mutant.kernels})
    runs = [Mutant(name, "", "", "", [name]) for name in names]
    runs += [Mutant(FUNCTIONS, "", "", "", ["functions/"])] if of_functions else []
    kinds = {BACKWARD: "backward_", BACKWARD_FUNCTIONS: "functions/backward_"}
    tests = {(mutant.test, kinds.get(program_of(mutant), "")) for mutant in mutants if mutant.test}
    runs += [Mutant(test, "", "", "", [kind] if kind else [], test) for test, kind in sorted(tests)]
    fuzz = build.make(folder, WORK / "kernels", names, FUZZ) if names else None

    def passes(run: Mutant) -> None:
        named = run.test or program_of(run) == FUNCTIONS
        command = command_of(build.folder / "tests/emulator" / program_of(run) if named else fuzz, run)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        expect_tests(run, done.stdout)
        if done.returncode != 0:
            raise Broken(f"{run.name} fails without a fault planted:\n{done.stdout[-2000:]}")

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(passes, runs))


def table(outcomes: list[Outcome]) -> str:
    found = sum(bool(outcome.caught_by) for outcome in outcomes)
    lines = [
        "# Faults planted in the kernels, and what finds them on the emulator",
        "",
        f"{found} of {len(outcomes)} found. Each fault of `tests/emulator/mutants.toml` is built into one kernel,",
        f"which then runs random cases (at most {CASES}) until one fails, or a test; the last column is its seed, or",
        "the test. The unchanged kernels pass all of them. Made by `tests/emulator/mutants.py`.",
        "",
        "| planted fault | file | kernel | found by | seed |",
        "|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        mutant = outcome.mutant
        by = outcome.caught_by or f"**survives**: {mutant.survives or 'not known why'}"
        where = mutant.test or outcome.seed
        lines.append(f"| {mutant.name} | {mutant.file} | {', '.join(mutant.kernels)} | {by} | {where} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build/emulator")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N of them, chosen by --seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose name holds it")
    parser.add_argument("--table", type=Path, help="where the table is written, as Markdown")
    arguments = parser.parse_args()
    os.nice(10)

    listed = [Mutant(**entry) for entry in tomllib.loads((HERE / "mutants.toml").read_text())["mutant"]]
    mutants = [mutant for mutant in listed if arguments.only in mutant.name]
    if arguments.sample:
        mutants = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
    try:
        build = Build(arguments.build.resolve(), sorted({program_of(mutant) for mutant in mutants}))
        for mutant in listed:  # all of them, whatever the sample: texts that are gone shall not wait for their turn
            planted((WORK / "kernels" / mutant.file).read_text(), mutant)
        if not arguments.sample and not arguments.only:
            unchanged_pass(build, mutants)
        outcomes, broken = [], []
        with ThreadPoolExecutor(JOBS) as pool:
            runs = [pool.submit(try_one, build, mutant, n) for n, mutant in enumerate(mutants)]
            for mutant, run in zip(mutants, runs, strict=True):
                try:
                    outcome = run.result()
                except Broken as error:  # the others have their turn
                    broken.append(mutant.name)
                    print(f"{mutant.name}: BROKEN\n{error}", flush=True)
                    continue
                outcomes.append(outcome)
                verdict = outcome.caught_by or ("SURVIVES" if not outcome.mutant.survives else "survives, as it should")
                print(f"{outcome.seconds:5.0f} s  {outcome.mutant.name}: {verdict} {outcome.seed}", flush=True)
                if outcome.detail:
                    print(f"         {outcome.detail[:200]}", flush=True)
    except Broken as error:
        print(error)
        return 2
    if arguments.table:
        arguments.table.write_text(table(outcomes))
    wanted = sum(outcome.as_wanted() for outcome in outcomes)
    print(f"{len(outcomes)} mutants, {wanted} as wanted, {sum(bool(o.caught_by) for o in outcomes)} found")
    if broken:
        print(f"{len(broken)} cannot be made: {', '.join(broken)}")
        return 2
    return 0 if wanted == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
