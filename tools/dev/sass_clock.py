"""Models how long an iteration of the loop over key tiles takes on a quarter of an SM. Nothing is measured.

A quarter has a scheduler that issues one instruction per clock, a tensor pipe and a MUFU pipe; the four quarters take
turns at the shared memory. Warps execute in order and obey the control codes of ptxas: the clocks until the next
instruction, and the scoreboards to wait for. Variable-latency results arrive after LATENCY.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sass import Instruction

QUARTERS = 4
HMMA_FLOP = 16 * 8 * 16 * 2
MUFU_LANES = 4  # per clock and quarter

# Clocks from issue to result for instructions that release a scoreboard, of the order that microbenchmarks publish for
# Ampere to Hopper. There are no published figures for SM12x.
LATENCY = {"LDSM": 33, "LDS": 30, "MUFU": 20, "SHFL": 24, "VOTE": 12, "LDC": 30, "LDCU": 30, "S2UR": 30, "R2UR": 12}
OTHER_LATENCY = 20
# K, V and page numbers are fetched one tile ahead: the model assumes that they have arrived when they are waited for.
NEVER_AWAITED = ("LDG", "LDGSTS", "LDGDEPBAR", "DEPBAR")
FILLING_TURNS, COUNTED_TURNS = 4, 16  # per warp


@dataclass(frozen=True)
class Part:
    """What differs between the chips."""

    tensor_flop: int  # per clock and SM

    @property
    def hmma_clocks(self) -> float:
        return HMMA_FLOP / (self.tensor_flop / QUARTERS)


FULL_RATE, GEFORCE = Part(1024), Part(512)


def wavefronts(instruction: Instruction) -> int:
    """Shared-memory clocks, of 128 bytes each, that a warp's instruction takes without bank conflicts."""
    if not instruction.works:
        return 0
    if instruction.name == "LDSM":
        return {"4": 4, "2": 2}.get(instruction.opcode.rpartition(".")[2], 1)
    if instruction.name in ("LDGSTS", "LDS", "STS"):
        return 4 if ".128" in instruction.opcode else 2 if ".64" in instruction.opcode else 1
    return 0


@dataclass
class Units:
    """Clocks that each unit works when one warp in every quarter executes one iteration."""

    tensor: float
    shared: float
    mufu: float
    issue: float

    def busiest_beside_tensor(self) -> tuple[str, float]:
        clocks, name = max((self.shared, "shared"), (self.mufu, "MUFU"), (self.issue, "issue"))
        return name, clocks / self.tensor


def units(path: list[Instruction], part: Part) -> Units:
    return Units(
        tensor=sum(part.hmma_clocks for i in path if i.name == "HMMA"),
        shared=sum(wavefronts(i) for i in path) * QUARTERS,
        mufu=sum(32 / MUFU_LANES for i in path if i.name == "MUFU"),
        issue=len(path),
    )


@dataclass
class Warp:
    cta: int
    ready: float
    at: int = 0  # position in the path
    turn: int = 0
    at_barrier: bool = False
    free: list[float] = field(default_factory=lambda: [0.0] * 8)  # clock of each scoreboard's release; 7 is none


class Quarter:
    """`ctas` CTAs in the loop, each with `warps` warps in this quarter."""

    def __init__(self, path: list[Instruction], part: Part, ctas: int, warps: int):
        self.path, self.part = path, part
        # Spread the CTAs over an iteration: they do not run in step.
        offset = sum(i.stall for i in path) / ctas
        self.warps = [Warp(cta, cta * offset) for cta in range(ctas) for _ in range(warps)]
        self.tensor_free = self.mufu_free = self.shared_free = 0.0
        self.now = 0.0

    def earliest(self, warp: Warp) -> float:
        instruction = self.path[warp.at]
        awaited = (warp.free[n] for n in range(6) if instruction.waits >> n & 1)
        pipe = {"HMMA": self.tensor_free, "MUFU": self.mufu_free}.get(instruction.name, 0.0)
        return max(self.now, warp.ready, pipe, *awaited)

    def issue(self, warp: Warp, time: float) -> None:
        instruction = self.path[warp.at]
        done = time
        if instruction.name == "HMMA":
            self.tensor_free = time + self.part.hmma_clocks
        if instruction.name == "MUFU":
            self.mufu_free = time + 32 / MUFU_LANES
        if clocks := wavefronts(instruction):
            done = max(time, self.shared_free)
            self.shared_free = done + clocks * QUARTERS
        if instruction.name not in NEVER_AWAITED:
            done += LATENCY.get(instruction.name, OTHER_LATENCY)
        for scoreboard in (instruction.write_barrier, instruction.read_barrier):
            warp.free[scoreboard] = max(warp.free[scoreboard], done)
        warp.ready = time + max(instruction.stall, 1)
        warp.at_barrier = instruction.name == "BAR"
        warp.at = (warp.at + 1) % len(self.path)
        warp.turn += warp.at == 0
        cta = [w for w in self.warps if w.cta == warp.cta]
        if all(w.at_barrier for w in cta):
            for other in cta:
                other.at_barrier, other.ready = False, max(other.ready, time + 1)

    def run(self, turns: int) -> float:
        """The clock when the warps together have made `turns` iterations; some warps may be ahead of others."""
        last = self.warps[0]
        while sum(w.turn for w in self.warps) < turns:
            # Among the warps that can issue, the scheduler prefers the last one.
            ready = [(self.earliest(w), w is not last, n) for n, w in enumerate(self.warps) if not w.at_barrier]
            time, _, n = min(ready)
            last = self.warps[n]
            self.issue(last, time)
            self.now = time + 1
        return self.now


def turn_clocks(path: list[Instruction], part: Part, ctas: int, warps: int) -> float:
    """Clocks of the quarter per iteration of one of its warps, once the pipes are full."""
    quarter, together = Quarter(path, part, ctas, warps), ctas * warps
    filled = quarter.run(FILLING_TURNS * together)
    counted = COUNTED_TURNS * together
    return (quarter.run(FILLING_TURNS * together + counted) - filled) / counted


def tensor_share(path: list[Instruction], part: Part, ctas: int, warps: int) -> tuple[float, float]:
    """Fraction of time in which the tensor pipe is busy: the bound by the busiest unit, and as the model executes
    it."""
    one = units(path, part)
    bound = one.tensor / max(one.tensor, one.shared, one.mufu, one.issue)
    return bound, min(bound, one.tensor / turn_clocks(path, part, ctas, warps))
