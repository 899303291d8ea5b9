"""flash-attention's own rule for gradients on its parameter grid: the error is at most three times that of torch's own
attention in the same type, and a small number. Fixed samples, and new ones every day. Skipped without torch.

FLASHSPARK_GRID_SEED=n repeats the samples of another day (they are named seed-number). FLASHSPARK_GRID_CASES: samples
of each kind and seed.
"""

from __future__ import annotations

import os
from dataclasses import replace

import flashspark
import numpy as np
import pytest
from dropout_reference import dropped
from flash_attn_grid import Case, draw, make, today
from reference import Options

torch = pytest.importorskip("torch")

from gradient_reference import attend  # noqa: E402 - it needs torch
from torch_arrays import moved  # noqa: E402

CASES = int(os.environ.get("FLASHSPARK_GRID_CASES", "36"))
SIZES = [(1, 128), (1, 239), (3, 270), (16, 300), (64, 128), (128, 128), (113, 203), (108, 256), (256, 113), (17, 16)]
DTYPES = ["float32", "float16", "bfloat16"]
SAMPLES = [(kind, seed, n) for kind in ("dense", "varlen") for seed in (0, today()) for n in range(CASES)]
STATE = (7, 8)
FLOATS = ("q", "k", "v", "sinks", "alibi_slopes")


def sample(kind: str, seed: int, number: int) -> tuple[Case, float]:
    """A case of the forward grid, as training has it, and dropout_p: flash-attention tests 0 and 0.17."""
    case = draw(kind, number, seed, SIZES, DTYPES)
    dropout = 0.17 if np.random.default_rng([seed, number, 5]).random() < 0.4 else 0.0
    return replace(case, page_size=None, given=0, num_splits=0), dropout


def sequences(case: Case, x: dict):
    """(rows of q, keys) of each sequence as slices of the first dimensions."""
    if case.kind == "dense":
        for b in range(case.batch):
            yield b, b, case.longest
        return
    used = [x.get(f"seqused_{side}", x[f"cu_seqlens_{side}"].diff()) for side in "qk"]
    for b in range(case.batch):
        lengths = tuple(int(n[b]) for n in used)
        starts = [int(x[f"cu_seqlens_{side}"][b]) for side in "qk"]
        yield (*(slice(s, s + n) for s, n in zip(starts, lengths)), lengths)


def by_formula(case: Case, dropout: float, given: dict, dout, dtype):
    x = {n: t.detach().to(dtype).requires_grad_() if n in FLOATS else t for n, t in given.items()}
    loss = 0 * sum(x[n].double().sum() for n in "qkv")
    for b, (rows, keys, (tq, tk)) in enumerate(sequences(case, x)):
        left, right = case.window
        options = Options(causal=case.causal, left=left, right=right, softcap=case.softcap, softmax_scale=case.scale)
        if case.alibi:
            options.alibi_slopes = x["alibi_slopes"] if case.alibi == 1 else x["alibi_slopes"][b]
        if case.sinks:
            options.sinks = x["sinks"]
        if dropout:
            options.dropout_p, options.dropped = dropout, dropped(STATE, dropout, b, case.heads[0], tq, tk)
        keep = None
        if case.chunk:
            places = torch.arange(tq)[:, None] + tk - tq
            keep = places.div(case.chunk, rounding_mode="floor") == torch.arange(tk) // case.chunk
        out, _ = attend(x["q"][rows], x["k"][keys], x["v"][keys], options, keep)
        loss = loss + (out.double() * dout[rows].double()).sum()
    loss.backward()
    return {n: torch.zeros_like(x[n]) if x[n].grad is None else x[n].grad for n in FLOATS if n in x}


@pytest.mark.parametrize(("kind", "seed", "number"), SAMPLES, ids=["-".join(map(str, s)) for s in SAMPLES])
def test_flash_attentions_rule(kind, seed, number):
    case, dropout = sample(kind, seed, number)
    call = make(case)
    given = {n: moved(x) for n, x in call.arrays.items()}
    dtype = given["q"].dtype
    dout = torch.randn(*given["q"].shape[:-1], case.dims[1], generator=torch.Generator().manual_seed(number)).to(dtype)
    options = {n: x for n, x in call.options.items() if n not in ("return_softmax_lse", "num_splits")}
    leaves = {n: x.clone().requires_grad_() if n in FLOATS else x for n, x in given.items()}
    more = {"dropout_p": dropout, "rng_state": STATE} if dropout else {}
    out = getattr(flashspark, call.function)(**leaves, **options, **more)
    unused = torch.ones(out.shape[:-1] if kind == "varlen" else (0,), dtype=torch.bool)
    for rows, _, _ in sequences(case, given) if kind == "varlen" else ():
        unused[rows] = False
    out.backward(dout.masked_fill(unused[..., None], 0) if kind == "varlen" else dout)
    want = by_formula(case, dropout, given, dout, torch.float64)
    theirs = by_formula(case, dropout, given, dout, dtype)
    for name, exact in want.items():
        got = leaves[name].grad
        assert got.isfinite().all() and got.shape == exact.shape, f"{name} of {case}"
        if not got.numel():
            continue
        error, other = ((x.double() - exact).abs().max().item() for x in (got, theirs[name]))
        # flash-attention's tolerance: what adding and taking away 0.3 loses in this type, twice.
        narrow = exact.to(got.dtype)
        least = 2 * (narrow + 0.3 - 0.3 - narrow).abs().max().item()
        if dtype == torch.float32:  # which flash-attention does not have: the project's own bound
            least += 1e-5 * exact.abs().max().item()
        assert error <= 3 * other + least, f"{name}: error {error:.3g}, torch's {other:.3g}, of {case}"
