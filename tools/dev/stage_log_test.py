"""Nothing that run_tests.py runs can be lost: skipped tests, programs without tests, crashes. Standard library only."""

from __future__ import annotations

import tempfile
import unittest
from functools import partial
from pathlib import Path

from stage_log import Failed, Log, allowed_skips, program_by_program, read_gtest, read_pytest, read_unittests

GTEST = """[==========] Running 3 tests from 1 test suite.
[ RUN      ] A.First
[       OK ] A.First (0 ms)
[ RUN      ] A/B.Second/x
a/b_test.cpp:43: Skipped
no address space

[  SKIPPED ] A/B.Second/x (0 ms)
[ RUN      ] A.Third
a/b_test.cpp:50: Failure
[  FAILED  ] A.Third (0 ms)
[==========] 3 tests from 1 test suite ran. (1 ms total)
[  PASSED  ] 1 test.
[  SKIPPED ] 1 test, listed below:
[  SKIPPED ] A/B.Second/x
[  FAILED  ] 1 test, listed below:
[  FAILED  ] A.Third
"""
PYTEST = """..s.
=========================== short test summary info ============================
SKIPPED [2] tests/python/test_a.py:12: could not import 'torch': No module named 'torch'
SKIPPED [1] tests/python/test_b.py: needs: a colon
FAILED tests/python/test_c.py::test_x - assert 0
1 failed, 4 passed, 3 skipped in 0.02s
"""
UNITTEST = """test_a (__main__.A.test_a) ... ok
test_b (__main__.A.test_b)
What it is for. ... skipped 'minutes under an emulator'
test_c (__main__.A.test_c) ... FAIL

FAIL: test_c (__main__.A.test_c)
Ran 3 tests in 0.1s

FAILED (failures=1, skipped=1)
"""


class Readers(unittest.TestCase):
    def test_gtest(self) -> None:
        passed, failed, failures, skips = read_gtest("p", GTEST)
        self.assertEqual((passed, failed, failures), (1, 1, ["A.Third"]))
        self.assertEqual(skips, [("A/B.Second/x", "no address space")])
        parameters = GTEST.replace("Third (0", "Third/x, where GetParam() = (4, 8) (0")
        self.assertEqual(read_gtest("p", parameters)[2], ["A.Third/x"])
        disabled = read_gtest("p", GTEST + "  YOU HAVE 2 DISABLED TESTS\n")
        self.assertEqual(disabled[3][1], ("p", "2 disabled"))

    def test_pytest(self) -> None:
        passed, failed, failures, skips = read_pytest(PYTEST)
        self.assertEqual((passed, failed, failures), (4, 1, ["tests/python/test_c.py::test_x"]))
        torch = ("tests/python/test_a.py", "could not import 'torch': No module named 'torch'")
        self.assertEqual(skips, [torch, torch, ("tests/python/test_b.py", "needs: a colon")])
        left_out = read_pytest("4 passed, 1 deselected, 2 xfailed, 1 warning in 1s\n")[3]
        self.assertEqual(left_out, [("pytest", "1 deselected"), ("pytest", "2 xfailed")])

    def test_unittest(self) -> None:
        passed, failed, _, skips = read_unittests(UNITTEST, 1)
        self.assertEqual((passed, failed), (1, 1))
        self.assertEqual(skips, [("test_b (__main__.A.test_b)", "minutes under an emulator")])

    def test_unittests_of_programs_that_ran_together(self) -> None:
        lines = UNITTEST.splitlines()
        mixed = "\n".join(f"{n}: {line}" for line in lines for n in (11, 2)) + "\n1/2 Test #2: a ... Passed\n"
        self.assertEqual(program_by_program(mixed), 2 * UNITTEST)
        passed, failed, _, skips = read_unittests(program_by_program(mixed), 2)
        self.assertEqual((passed, failed, len(skips)), (3, 1, 2))

    def test_programs_that_ran_nothing_or_did_not_finish(self) -> None:
        for reader, out in (
            (read_pytest, "no tests ran in 0.01s\n"),
            (read_pytest, "3 skipped in 0.01s\n"),
            (read_pytest, ""),
            (read_pytest, "4 passed, 3 skipped in 0.01s\n"),  # without their reasons
            (lambda out: read_gtest("p", out), GTEST[:200]),
            (
                lambda out: read_gtest("p", out),
                "[====] 0 tests from 0 test suites ran. (0 ms)\n[  PASSED  ] 0 tests.\n",
            ),
            (lambda out: read_gtest("p", out), GTEST.replace("[  SKIPPED ] 1 test", "[  SKIPPED ] 2 tests")),
            (lambda out: read_unittests(out, 1), "Ran 0 tests in 0.0s\n"),
            (lambda out: read_unittests(out, 2), UNITTEST),
            (lambda out: read_unittests(out, 1), UNITTEST.replace("... skipped", "..., left out")),
        ):
            with self.subTest(out=out), self.assertRaises(Failed):
                reader(out)


class Stages(unittest.TestCase):
    def judged(self, *skips: tuple[str, str], passed: int = 0) -> list[str]:
        log = Log(Path("unused"), passed=passed, skips=list(skips))
        log.judge_skips("unit", [("unit", "*BigStride*", "no space"), ("other", "*", "else")])
        self.assertEqual(log.failed, len(log.failures))
        return log.failures

    def test_a_stage_without_tests_fails(self) -> None:
        self.assertEqual(self.judged(), ["the stage ran no tests"])
        self.assertEqual(self.judged(passed=1), [])

    def test_only_skips_on_the_list_are_allowed(self) -> None:
        self.assertEqual(self.judged(("X/BigStride.Y", "no space")), [])
        for skip in (("BigStride", "no spac"), ("BigStride", "No space"), ("Big", "no space"), ("BigStride", "else")):
            self.assertEqual(len(self.judged(skip, passed=5)), 1)

    def test_tasks_that_run_together(self) -> None:
        ran: list[int] = []

        def task(number: int) -> None:
            if number == 1:
                raise Failed("the second")
            ran.append(number)

        log = Log(Path("unused"))
        with self.assertRaisesRegex(Failed, "the second"):
            log.together(partial(task, number) for number in range(5))
        self.assertEqual(sorted(ran), [0, 2, 3, 4])

    def test_the_list(self) -> None:
        self.assertGreater(len(allowed_skips()), 5)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "list.txt")
            path.write_text("# a remark\nunit | A.B | why | not\n\nunit | no reason\n")
            with self.assertRaises(Failed):
                allowed_skips(path)


if __name__ == "__main__":
    unittest.main(verbosity=2)
