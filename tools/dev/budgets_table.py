"""The table of the compile budgets, with what the model predicts from them."""

from __future__ import annotations

from kernel_list import Launch
from measured_kernel import Measured
from sass_clock import FULL_RATE, GEFORCE, LATENCY, OTHER_LATENCY, tensor_share, units

TEXT = """# Compile budgets of the sm_120f kernels, and what they predict

Written by `python tools/dev/budgets.py --table` from the machine code of nvcc {nvcc}; the values are held by
`tests/budgets.json` and the stage `budgets` of `make test`. bf16 shown, and e4m3 keys and
values{fp16}. **Predictions of a model, not
measurements: none of this ran on an SM12x GPU.**

{table}

- *tile*: warps x rows a warp x keys, of which two key groups (g2) take half each, in pieces of so many keys (/16)
  where a warp does not hold all scores at once; 1 or 2 buffers of K and V; Q in registers (r) or shared memory (s).
  Of gradients: warps x keys a warp x rows of a block, in pieces of so many rows; what the two warps of a pair have
  apart (`kernels/backward/instances.def`).
- *CTAs*: resident on an SM, by registers, shared memory (100 KB, 1 KB of it reserved a block) and 48 warps.
- *HMMA ... other*: instructions of one warp for the keys that it takes at once, on the way that most tiles take:
  contiguous keys that need no mask, running maximum unmoved, score modifications off. *loop* counts the ways not taken
  as well. Of a tile in pieces it is the loop over the pieces, without the tile's barrier and copies: its share is
  flattered. Of pairs that share columns dQ is counted at both of the places where it stands, of which a warp takes one.
- *next unit*: the busiest unit beside the tensor pipe on a full-rate part; its time as a share of the tensor pipe's.
- *full rate*, *GeForce*: predicted share of time in which the tensor pipe works, in the inner loop, with these CTAs.

## The model

Rates (`tools/dev/sass_clock.py`), of an SM and in clocks of it:

| unit | rate | an instruction of a warp takes |
|---|---|---|
| tensor, four quarters | 1024 FLOP a clock (RTX PRO, GB10), GeForce 512 | HMMA.16816: 16, 32 clocks of a quarter |
| shared memory | 128 bytes a clock, no bank conflicts (the emulator tests that) | LDSM.x4, 16-byte copy: 4 clocks |
| MUFU, four quarters | 16 lanes a clock | 8 clocks of a quarter |
| issue, four quarters | one instruction a clock and quarter | 1 |

1. **Bound.** R warps a quarter need R times each unit's clocks for a tile, so the tensor pipe works at most
   tensor / max(tensor, shared, MUFU, issue) of the time. {bound}
2. **Run.** Warps wait, for results and for each other, so the bound is not reached. The model runs the inner loop's
   instructions for all resident warps of a quarter through these units: in order, one issue a clock, the scheduler
   staying with a warp while it can issue, with the stall counts and scoreboards that ptxas wrote into the code, and
   with the block's barrier once a tile. ptxas itself spaces a warp's HMMA by 16 clocks on sm_120f: the full rate.

Assumed:

- Latencies where the code waits on a scoreboard, in clocks: {latencies}, others {other}.
  They are of the order published for earlier generations; SM12x's are not known.
- GeForce has the same latencies and half the tensor rate.
- K, V and page numbers have arrived when the loop waits for them: L2 and memory keep up.
- The four quarters run alike; the blocks of an SM do not run in step.
- Register bank conflicts, taken branches and instruction fetch cost nothing.
- Not in it: first and last tiles, masks, the epilogue, an uneven last wave. They take from a real run's share.
"""


def forward_tile(tile: Launch) -> str:
    groups = f" g{tile.key_groups}" if tile.key_groups > 1 else ""
    pieces = f"/{tile.score_keys}" if tile.score_keys * tile.key_groups < tile.keys else ""
    buffers = 1 if tile.buffering == "single_buffer" else 2
    queries = "s" if tile.queries == "shared" else "r"
    return f"{tile.warps}x{tile.warp_rows}x{tile.keys}{pieces}{groups}, {buffers} {queries}"


def backward_tile(tile: Launch) -> str:
    pieces = f"/{tile.score_rows}" if tile.score_rows < tile.rows else ""
    sharing = "" if tile.sharing == "none" else f", pairs share {tile.sharing}"
    return f"{tile.warps}x{tile.warp_keys}x{tile.rows}{pieces}{sharing}"


def row(measured: Measured) -> list[str]:
    values, kernel, tile = measured.values, measured.kernel, measured.launch
    registers = f"{values['registers']} / {measured.allowed_registers}"
    if not measured.loop:
        shared = f"{values['shared_bytes'] / 1024:.0f}"
        return [measured.name, "", "", registers, str(values["spill_bytes"]), shared, *[""] * 9]
    way = measured.loop.path
    unit, share = units(way, FULL_RATE).busiest_beside_tensor()
    gradients = kernel.operation == "attention_backward"
    return [
        kernel.instance + (" gradients" if gradients else "") + (" e4m3" if kernel.dtype == "e4m3" else ""),
        backward_tile(tile) if gradients else forward_tile(tile),
        str(measured.resident),
        registers,
        str(values["spill_bytes"]),
        f"{values['shared_bytes'] / 1024:.0f}",
        *[str(values[key]) for key in ("hmma", "ldsm", "mufu", "ldgsts", "other", "loop")],
        f"{unit} {share:.0%}",
        *[f"{tensor_share(way, part, measured.resident, tile.warps // 4)[1]:.0%}" for part in (FULL_RATE, GEFORCE)],
    ]


def table(kernels: list[Measured], nvcc: str) -> str:
    head = ["instance", "tile", "CTAs", "registers / allowed", "spilled bytes", "shared KB", "HMMA", "LDSM", "MUFU"]
    head += ["LDGSTS", "other", "loop", "next unit", "full rate", "GeForce"]
    shown = [k for k in kernels if k.kernel.dtype != "fp16"]
    lines = [head, ["---"] * len(head), *map(row, shown)]
    bf16, fp16 = ([k for k in kernels if k.kernel.dtype == dtype] for dtype in ("bf16", "fp16"))
    unlike = [a.kernel.instance or a.name for a, b in zip(bf16, fp16, strict=True) if a.values != b.values]
    loops = [k for k in shown if k.loop]
    bounds = {k.name: tensor_share(k.loop.path, FULL_RATE, 1, 1)[0] for k in loops if k.loop}
    below = [f"{name} {bound:.0%}" for name, bound in bounds.items() if bound < 1]
    return TEXT.format(
        nvcc=nvcc,
        fp16=f"; fp16 differs by a few registers or instructions in {', '.join(unlike)}"
        if unlike
        else ", fp16 is the same",
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        bound=f"Below 100% on a full-rate part: {', '.join(below)}." if below else "It is 100% for every line.",
        latencies=", ".join(f"{name} {clocks}" for name, clocks in LATENCY.items()),
        other=OTHER_LATENCY,
    )
