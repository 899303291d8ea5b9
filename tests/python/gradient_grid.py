"""The parameter grids of flash-attention's tests of gradients (tests/test_flash_attn.py), as data, with its rule: the
error against exact gradients is at most three times that of torch's own attention in the same type, and a small number.

A grid is the product of its axes; `sample` takes points of all grids, the same ones every time. tests/python runs a few
small ones on the CPU, tests/gpu thousands.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import flashspark
import torch
from dropout_torch import dropped_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
STATE = (7, 8)  # of dropout
BOTH, TYPES = (False, True), tuple(DTYPES)
WIDTHS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
MASKS = {"local": BOTH, "causal": BOTH}
COMMON = {"dtype": TYPES, "deterministic": BOTH, "alibi": BOTH, **MASKS, "dropout": (0.0, 0.17)}
RAGGED = ((113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024),
          (1024, 1023), (2048, 2048))  # fmt: skip
UNEQUAL = ((1, 239), (3, 799), (127, 512), (127, 513), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512),
           (1023, 1024))  # fmt: skip
SWAPPED = (*UNEQUAL, *((keys, rows) for rows, keys in UNEQUAL))
RACES = ((1, 239), (239, 1), (3, 799), (799, 3), (1024, 128), (97, 97), (128, 128), (200, 200), (256, 256), (257, 257),
         (384, 384), (512, 512), (768, 768), (1024, 1024))  # fmt: skip
HEADS = ((6, 6), (6, 1), (6, 2))


def square(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((n, n) for n in lengths)


def widths_without(*left_out: int) -> tuple[int, ...]:
    return tuple(d for d in WIDTHS if d not in left_out)


@dataclass(frozen=True)
class Point:
    """kind: packed sequences or dense ones. packed: q, k and v, or k and v, come in one tensor."""

    grid: str
    size: tuple[int, int]  # query tokens and keys of the longest sequence
    d: int
    dtype: str
    kind: str = "dense"
    packed: str = ""
    heads: tuple[int, int] = (9, 9)
    batch: int = 4
    causal: bool = False
    local: bool = False
    alibi: bool = False
    deterministic: bool = False
    dropout: float = 0.0
    softcap: float = 0.0
    spread: float = 1.0  # of q
    repeats: int = 0  # instead of the rule: the same bits again, but for dq without `deterministic`
    turned: bool = False  # dout is not contiguous
    seed: int = 0


# Of each grid: how many of 100 points of a sample, its axes, and what all its points have.
GRIDS: dict[str, tuple[int, dict[str, tuple], dict[str, Any]]] = {
    "qkvpacked": (14, {**COMMON, "d": WIDTHS, "size": square(97, 128, 200, 384, 768, 1024, 1025, 2048)},
                  {"packed": "qkv"}),
    "varlen_qkvpacked": (14, {**COMMON, "d": widths_without(40, 111),
                              "size": square(97, 128, 200, 257, 384, 512, 768, 1025, 2048)},
                         {"packed": "qkv", "kind": "varlen"}),
    "output": (24, {**COMMON, "packed": ("", "kv"), "heads": HEADS, "d": widths_without(80), "size": RAGGED,
                    "softcap": (0.0, 50.0)}, {}),
    "varlen_output": (24, {**COMMON, "packed": ("", "kv"), "heads": HEADS, "d": widths_without(40),
                           "size": ((1, 147), *RAGGED), "softcap": (0.0, 50.0)}, {"kind": "varlen"}),
    "causal": (6, {"dtype": TYPES, "local": BOTH, "d": WIDTHS, "size": SWAPPED}, {"causal": True}),
    "varlen_causal": (6, {"dtype": TYPES, "local": BOTH, "d": WIDTHS, "size": SWAPPED},
                      {"causal": True, "kind": "varlen"}),
    "race_condition": (3, {"dtype": ("float16",), "causal": BOTH, "d": WIDTHS, "size": RACES, "dropout": (0.0, 0.17)},
                       {"heads": (4, 4), "batch": 20, "repeats": 10}),
    "overflow": (2, {"dtype": ("float16",), "causal": BOTH, "d": (16, 32, 64), "size": square(1, 2, 5, 17, 128)},
                 {"heads": (5, 5), "batch": 2, "spread": 15.0}),
    "varlen_overflow": (1, {"dtype": ("float16",), "causal": BOTH, "d": (16, 32, 64), "size": ((146, 1), (76, 3))},
                        {"heads": (5, 5), "batch": 3, "spread": 9.0, "kind": "varlen"}),
    "transpose": (2, {"dtype": TYPES, "causal": BOTH, "d": (64, 128), "size": square(97, 128, 200, 256)},
                  {"heads": (2, 2), "batch": 5, "turned": True}),
    "deterministic": (2, {"dtype": TYPES, **MASKS, "d": WIDTHS, "size": SWAPPED},
                      {"deterministic": True, "repeats": 10}),
    "varlen_deterministic": (2, {"dtype": TYPES, **MASKS, "d": WIDTHS, "size": SWAPPED},
                             {"deterministic": True, "repeats": 10, "kind": "varlen"}),
}  # fmt: skip


def sample(count: int, most_scores: int = 1 << 22) -> list[Point]:
    """About `count` points with at most so many query tokens x keys, each grid's share of them. Along every axis all
    values come up equally often, in an order of that axis's own."""
    points = []
    for grid, (share, axes, options) in GRIDS.items():
        wanted = max(1, count * share // 100)
        columns = []
        for name, values in axes.items():
            rng = random.Random(f"{grid} {name}")
            fitting = [x for x in values if name != "size" or x[0] * x[1] <= most_scores]
            rng.shuffle(fitting)
            columns.append([fitting[n % len(fitting)] for n in range(wanted)])
            rng.shuffle(columns[-1])
        for n, chosen in enumerate(zip(*columns)):
            points.append(Point(grid, **dict(zip(axes, chosen)), **options, seed=n))
    return points


@dataclass
class Problem:
    """Sequences lie one behind the other. rows, keys: of each, its slices of the tokens of q, and of k and v."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    rows: list[slice]
    keys: list[slice]
    window: tuple[int, int]
    slopes: torch.Tensor | None


def build(p: Point, device: torch.device) -> Problem:
    rng = random.Random(f"{p.grid} {p.seed}")
    lengths = [[n if p.kind == "dense" else rng.randint(max(1, n - 20), n) for n in p.size] for _ in range(p.batch)]
    if p.packed == "qkv":
        lengths = [[rows, rows] for rows, _ in lengths]
    rows, keys = ([slice(sum(x[:n]), sum(x[: n + 1])) for n in range(p.batch)] for x in zip(*lengths))
    generator = torch.Generator().manual_seed(p.seed)

    def normal(tokens: int, heads: int, spread: float = 1.0) -> torch.Tensor:
        return (spread * torch.randn(tokens, heads, p.d, generator=generator)).to(device, DTYPES[p.dtype])

    q = normal(rows[-1].stop, p.heads[0], p.spread * (p.softcap or 1.0))
    k, v = (normal(keys[-1].stop, p.heads[1]) for _ in range(2))
    window = (rng.randrange(p.size[1]), rng.randrange(p.size[1])) if p.local else (-1, -1)
    slopes = 0.3 * torch.rand(p.batch, p.heads[0], generator=generator) if p.alibi else None
    return Problem(
        q, k, v, normal(len(q), p.heads[0]), rows, keys, window, None if slopes is None else slopes.to(device)
    )


def call(p: Point, x: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """flashspark's function for the point; out (tokens, heads, width)."""
    options: dict[str, Any] = {
        "causal": p.causal, "window_size": x.window, "softcap": p.softcap, "alibi_slopes": x.slopes,
        "deterministic": p.deterministic, "dropout_p": p.dropout, "rng_state": STATE if p.dropout else None,
    }  # fmt: skip
    if p.kind == "dense":
        q, k, v = (t.unflatten(0, (p.batch, -1)) for t in (q, k, v))
    lengths: list[Any] = []
    if p.kind == "varlen":
        sides = ([0, *(s.stop for s in each)] for each in (x.rows, x.keys))
        lengths = [torch.tensor(side, dtype=torch.int32, device=q.device) for side in sides]
    longest = [max(s.stop - s.start for s in each) for each in (x.rows, x.keys)] if lengths else []
    name = "flash_attn_varlen_" if lengths else "flash_attn_"
    if p.packed == "qkv":
        arguments = [torch.stack([q, k, v], -3), *lengths[:1], *longest[:1]]
    elif p.packed == "kv":
        arguments = [q, torch.stack([k, v], -3), *lengths, *longest]
    else:
        arguments = [q, k, v, *lengths, *longest]
    function = getattr(flashspark, f"{name}{p.packed and p.packed + 'packed_'}func")
    out = function(*arguments, **options)
    return out.flatten(0, 1) if p.kind == "dense" else out


def attention(p: Point, x: Problem, b: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """out of sequence b by the formula, in the type of its tensors."""
    (rows, heads, _), keys, device = q.shape, len(k), q.device
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q * p.d**-0.5, k)
    if p.softcap:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    distance = torch.arange(rows, device=device)[:, None] + keys - rows - torch.arange(keys, device=device)
    if x.slopes is not None:
        scores = scores - x.slopes[b].to(q.dtype)[:, None, None] * distance.abs()
    kept = torch.ones_like(distance, dtype=torch.bool)
    left, right = x.window
    right = 0 if p.causal else right
    if left >= 0:
        kept &= distance <= left
    if right >= 0:
        kept &= -distance <= right
    probabilities = torch.softmax(scores.masked_fill(~kept, -torch.inf), -1)
    probabilities = probabilities.masked_fill(~kept.any(-1)[:, None], 0)
    if p.dropout:
        dropped = dropped_of([b], STATE, p.dropout, heads, rows, keys, device)
        probabilities = probabilities.masked_fill(dropped[0], 0) / (1 - p.dropout)
    return torch.einsum("hij,jhd->ihd", probabilities.to(v.dtype), v)


def by_formula(p: Point, x: Problem, dtype: torch.dtype) -> list[torch.Tensor]:
    """dq, dk and dv by torch's autograd, sequence by sequence."""
    given = [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (x.q, x.k, x.v)]
    for b, (rows, keys) in enumerate(zip(x.rows, x.keys)):
        part = [t[s].to(dtype).requires_grad_() for t, s in ((x.q, rows), (x.k, keys), (x.v, keys))]
        gradients = torch.autograd.grad(attention(p, x, b, *part), part, x.dout[rows].to(dtype))
        for whole, s, one in zip(given, (rows, keys, keys), gradients):
            whole[s] = one
    return given


def noise(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """flash-attention's small number: what adding and taking away 0.3 loses in this type, twice."""
    narrow = exact.to(dtype)
    return 2 * (narrow + 0.3 - 0.3 - narrow).abs().max().item()


# Grids in which flash-attention asks for finite gradients alone: in rows with three keys or fewer, of large values,
# most of dS is what out loses by its rounding.
FINITE = frozenset({"varlen_overflow"})


def check(p: Point, device: torch.device) -> None:
    x = build(p, device)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    dout = x.dout.transpose(0, 1).contiguous().transpose(0, 1) if p.turned else x.dout
    out = call(p, x, *leaves)
    got = torch.autograd.grad(out, leaves, dout, retain_graph=p.repeats > 0)
    for name, ours in zip(("dq", "dk", "dv"), got):
        assert ours.isfinite().all(), name
    if p.repeats == 0 and p.grid not in FINITE:
        want, theirs = by_formula(p, x, torch.float64), by_formula(p, x, x.q.dtype)
        for name, ours, exact, other in zip(("dq", "dk", "dv"), got, want, theirs):
            error, peer = ((t.double() - exact).abs().max().item() for t in (ours, other))
            assert error <= 3 * peer + noise(exact, ours.dtype), f"{name}: error {error:.3g}, torch's {peer:.3g}"
    for _ in range(p.repeats):
        again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        assert torch.equal(again[1], got[1]) and torch.equal(again[2], got[2]), "dk or dv differ from run to run"
        if p.deterministic:
            assert torch.equal(again[0], got[0]), "dq differs from run to run"
        else:
            assert (again[0] - got[0]).abs().max().item() <= noise(got[0], got[0].dtype), "dq"
