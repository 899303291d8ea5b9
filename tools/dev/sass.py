"""Reads the machine code of a kernel: its instructions, the loop over key tiles, and the path through it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/")
UPPER_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
NO_BARRIER = 7


class NotUnderstood(Exception):
    """The code does not look as this parser expects."""


@dataclass
class Instruction:
    text: str  # without its predicate
    predicate: str  # "", "@P0", "@!UP1", ...
    stall: int  # clocks until the warp's next instruction
    write_barrier: int  # scoreboard freed when the result is there; 7: none
    read_barrier: int  # scoreboard freed when the operands have been read
    waits: int  # bits: scoreboards that must be free

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def never(self) -> bool:
        return self.predicate == "@!PT"


@dataclass
class Code:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def target(self, at: int) -> int | None:
        """Where the branch at this place leads; None if it is no branch."""
        instruction = self.instructions[at]
        label = TARGET.search(instruction.text)
        return self.labels.get(label[1]) if instruction.name == "BRA" and label else None


@dataclass
class Loop:
    first: int
    last: int
    path: list[Instruction]  # one turn: every HMMA, no rescaling, no mask, contiguous keys
    instructions: int  # in all, the rarely taken ones too


def read(nvdisasm: Path, cubin: Path) -> Code:
    text = subprocess.run([nvdisasm, "-c", "-hex", cubin], check=True, capture_output=True, text=True).stdout
    code = Code()
    lines = iter(text.splitlines())
    for line in lines:
        if label := LABEL.match(line):
            code.labels[label[1]] = len(code.instructions)
        elif found := INSTRUCTION.match(line):
            upper = UPPER_HALF.match(next(lines))
            if not upper:
                raise NotUnderstood(f"no second half of {found[2]}")
            control = int(upper[1], 16) >> 41
            predicate, _, text = found[2].rpartition(" ") if False else split_predicate(found[2])
            code.instructions.append(
                Instruction(
                    text, predicate, control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
                )
            )
    if not code.instructions:
        raise NotUnderstood("nvdisasm shows no instruction")
    return code
