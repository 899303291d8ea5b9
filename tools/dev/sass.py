"""Reads the machine code of a kernel: its instructions, the loop over key tiles, and the path through it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T\d]+) +)?(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/")
UPPER_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
SPILLS = ("LDL", "STL")


class NotUnderstood(Exception):
    """The code does not have the form that this parser expects."""


@dataclass
class Instruction:
    text: str  # without its predicate
    predicate: str  # "", "@P0", "@!UP1", ...
    stall: int  # clocks until the warp's next instruction
    write_barrier: int  # scoreboard released when the result is available; 7: none
    read_barrier: int  # scoreboard released when the operands have been read; 7: none
    waits: int  # bit mask of the scoreboards to wait for
    target: int | None = None  # where a branch leads

    @cached_property
    def opcode(self) -> str:
        return self.text.split()[0]

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def works(self) -> bool:
        return self.predicate != "@!PT"  # ptxas puts such loads before copies; they only take an issue slot

    @property
    def always_branches(self) -> bool:
        return self.name == "BRA" and not self.predicate and self.text.startswith("BRA `")


@dataclass
class Loop:
    first: int
    last: int
    path: list[Instruction]  # one iteration: every HMMA, no rescaling, no mask, contiguous keys
    instructions: list[Instruction]  # the whole loop, including the rarely taken paths

    def count(self, *names: str) -> int:
        return sum(1 for i in self.path if i.name in names and i.works)

    @property
    def spills(self) -> int:
        return sum(1 for i in self.instructions if i.name in SPILLS)


def read(listing: str) -> list[Instruction]:
    """What `nvdisasm -c -hex` shows."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = iter(listing.splitlines())
    for line in lines:
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            upper = UPPER_HALF.match(next(lines))
            if not upper:
                raise NotUnderstood(f"no second half of {found[3]}")
            control = int(upper[1], 16) >> 41  # stall, yield, write barrier, read barrier, wait mask, reuse
            code.append(
                Instruction(
                    found[3], found[2] or "", control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
                )
            )
    for instruction in code:
        label = TARGET.search(instruction.text)
        if instruction.name == "BRA" and label:
            instruction.target = labels[label[1]]
    if not code:
        raise NotUnderstood("no instructions")
    return code


def tensor_work(instructions: list[Instruction]) -> int:
    return sum(1 for i in instructions if i.name == "HMMA")


def path(code: list[Instruction], first: int, last: int) -> list[Instruction]:
    """The path from `first` to a branch back to it with the most HMMA, then most copies, then fewest instructions."""
    best: dict[int, tuple[int, int, int, int]] = {}  # from here on: HMMA, copies, -instructions, successor
    for at in range(last, first - 1, -1):
        here = code[at]
        successors = [] if here.always_branches or (here.name in ("EXIT", "RET") and not here.predicate) else [at + 1]
        if here.target is not None:
            successors.append(here.target)
        candidates = [(*best[n][:3], n) for n in successors if n > at and n in best]
        if here.target == first:
            candidates.append((0, 0, 0, -1))
        if candidates:
            tensor, copies, length, following = max(candidates)
            best[at] = (tensor + (here.name == "HMMA"), copies + (here.name == "LDGSTS"), length - 1, following)
    if first not in best:
        raise NotUnderstood(f"no path through the loop at instruction {first}")
    route, at = [], first
    while at != -1:
        route.append(code[at])
        at = best[at][3]
    return route


def has_path(code: list[Instruction], first: int, last: int) -> bool:
    try:
        return bool(path(code, first, last))
    except NotUnderstood:
        return False


def hot_loop(code: list[Instruction]) -> Loop:
    """The innermost loop with the most tensor work: the one over tiles that need no mask."""
    ends: Counter[int] = Counter()
    for at, instruction in enumerate(code):
        if instruction.target is not None and instruction.target <= at:
            ends[instruction.target] = max(ends[instruction.target], at)
    # A wait that stands behind the kernel's end comes back, too, but no path leads to it from there.
    loops = [
        (first, last)
        for first, last in ends.items()
        if tensor_work(code[first : last + 1]) and has_path(code, first, last)
    ]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        raise NotUnderstood("no loop with tensor work")
    first, last = max(inner, key=lambda loop: tensor_work(code[loop[0] : loop[1] + 1]))
    whole = code[first : last + 1]
    route = path(code, first, last)
    if tensor_work(route) != tensor_work(whole):
        raise NotUnderstood(f"a turn takes {tensor_work(route)} of the {tensor_work(whole)} HMMA of its loop")
    return Loop(first, last, route, whole)
