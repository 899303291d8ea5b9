"""Dropout on the GPU: what is dropped is docs/design/dropout.md's, key for key, under every mask, split and layout; out
and lse are the CPU engine's on the same numbers in float32."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import flashspark
import numpy as np
import pytest
import torch
from problem import ON_CPU, captured

sys.path.insert(1, str(Path(__file__).parents[1] / "python"))
import dropout_reference  # noqa: E402
from dropout_torch import dropped  # noqa: E402

CASES = int(os.environ.get("FLASHSPARK_DROPOUT_CASES", "40" if ON_CPU else "200"))
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # as tests/gpu/test_flex.py has it


def test_the_definition_is_the_same_here(device):
    for state in ((2**62 + 5, 3), (-1, 2**63 - 1)):
        want = dropout_reference.dropped_dense(state, 0.3, 2, 3, 5, 131)
        assert np.array_equal(dropped(state, 0.3, 2, 3, 5, 131, device).cpu().numpy(), want)


def test_probabilities_are_rounded_alike():
    for p in (2**-17, 2**-16, 3 * 2**-16, 0.1, 0.5, 0.9, 1 - 2**-20):
        assert dropout_reference.dropped_draws(p) == min(int(np.floor(np.float32(p).item() * 32768 + 0.5)), 32767)


@dataclass
class Shape:
    lengths: list[tuple[int, int]]
    heads: tuple[int, int]
    width: int
    dtype: torch.dtype
    p: float
    varlen: bool = False
    page_size: int = 0
    fp8: bool = False
    options: dict = field(default_factory=dict)

    @property
    def longest(self):
        return max(i for i, _ in self.lengths), max(j for _, j in self.lengths)


def drawn(seed) -> Shape:
    rng = random.Random(seed)
    width, heads = rng.choice([64, 128, 256]), rng.choice([(1, 1), (2, 1), (4, 4), (8, 2), (6, 1), (16, 2)])
    short = rng.random() < 0.4
    most = (rng.choice([1, 2, 5, 16]) if short else rng.choice([17, 64, 130, 300]), rng.choice([1, 33, 200, 500, 1100]))
    varlen = rng.random() < 0.5
    count = rng.choice([1, 2, 3])
    lengths = [(rng.randint(0, most[0]), rng.randint(0, most[1])) if varlen else most for _ in range(count)]
    lengths[0] = most
    options = {"causal": rng.random() < 0.5, "num_splits": rng.choice([0, 0, 1, 3, 8])}
    if rng.random() < 0.25:
        options |= {"causal": False, "window_size": (rng.choice([-1, 0, 40]), rng.choice([-1, 0, 15]))}
    options["deterministic"] = rng.random() < 0.2
    page_size = rng.choice([0, 0, 16, 48]) if varlen else 0
    p = rng.choice([0.05, 0.1, 0.5, 0.9, 0.999])
    dtype, fp8 = rng.choice([torch.bfloat16, torch.float16]), rng.random() < 0.15
    return Shape(lengths, heads, width, dtype, p, varlen, page_size, fp8, options)


class Tensors:
    """q, k and v of a shape, padded and dense, and the calls of them."""

    def __init__(self, shape: Shape, device, seed=0):
        make = torch.Generator().manual_seed(seed)
        self.shape, self.device = shape, device
        (rows, keys), (heads, heads_kv), batch = shape.longest, shape.heads, len(shape.lengths)
        sizes = [(batch, rows, heads), (batch, keys, heads_kv), (batch, keys, heads_kv)]
        self.qkv = [torch.randn(*s, shape.width, generator=make).to(shape.dtype) for s in sizes]

    def call(self, q, k, v, device, **given):
        """(out, lse, ..) of dense tensors; out is dense again, with zeros where a sequence is shorter."""
        shape = self.shape
        given = {**shape.options, **given, "return_softmax_lse": True}
        q, k, v = (x.to(device) for x in (q, k, v))
        if shape.fp8:
            k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
        if not shape.varlen:
            return flashspark.flash_attn_func(q, k, v, **given)
        rows, keys = ([pair[side] for pair in shape.lengths] for side in (0, 1))
        starts = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32, device=device) for n in (rows, keys)]
        q = torch.cat([q[b, :n] for b, n in enumerate(rows)])
        if shape.page_size:
            k, v, table = self.paged(k, v)
            lengths = torch.tensor(keys, dtype=torch.int32, device=device)
            given |= {"block_table": table, "seqused_k": lengths}
            starts[1] = None
        else:
            k, v = (torch.cat([x[b, :n].view(torch.uint8) for b, n in enumerate(keys)]).view(x.dtype) for x in (k, v))
        out, *others = flashspark.flash_attn_varlen_func(q, k, v, *starts, *shape.longest, **given)
        padded = out.new_zeros(len(rows), shape.longest[0], *out.shape[1:])
        for b, n in enumerate(rows):
            padded[b, :n] = out[sum(rows[:b]) :][:n]
        return padded, *others

    def paged(self, k, v):
        """The keys in pages, backwards."""
        size, batch = self.shape.page_size, len(self.shape.lengths)
        slots = -(-k.shape[1] // size)
        pages = []
        for x in (k, v):
            grown = torch.zeros(batch, slots * size, *x.shape[2:], dtype=torch.float32, device=x.device)
            grown[:, : x.shape[1]] = x.float()
            pages.append(grown.to(x.dtype).view(torch.uint8).view(batch * slots, size, x.shape[2], -1).flip(0))
        table = torch.arange(batch * slots - 1, -1, -1, dtype=torch.int32, device=k.device).view(batch, slots)
        return pages[0].view(k.dtype), pages[1].view(v.dtype), table

    def seen(self, device, **dropout):
        """bool (batch, heads, rows, keys): the keys that reach a row, by attention of zeros to values of one key each.

        With all scores equal, no probability is too small for the result's type.
        """
        q, k, v = (torch.zeros_like(x) for x in self.qkv)
        parts = []
        for first in range(0, k.shape[1], self.shape.width):
            values = torch.zeros_like(v)
            columns = torch.arange(first, min(first + self.shape.width, k.shape[1]))
            values[:, columns, :, columns - first] = 1
            parts.append(self.call(q, k, values, device, **dropout)[0] != 0)
        return torch.cat(parts, -1)[..., : k.shape[1]].transpose(1, 2)


@pytest.mark.parametrize("seed", range(CASES))
def test_masks(seed, device):
    shape = drawn(seed)
    tensors = Tensors(shape, device)
    state = (random.Random(-seed).getrandbits(62), seed)
    visible = tensors.seen(device)
    kept = tensors.seen(device, dropout_p=shape.p, rng_state=state)
    want = dropped(state, shape.p, *visible.shape, device)
    assert torch.equal(kept, visible & ~want), f"{shape}: {(kept != (visible & ~want)).sum()} of {kept.numel()}"


def compare(tensors: Tensors, device, **given):
    shape = tensors.shape
    results = [tensors.call(*tensors.qkv, device, **given)]
    wide = [x.float() for x in tensors.qkv]
    if shape.fp8:
        wide[1:] = [x.to(torch.float8_e4m3fn).float() for x in wide[1:]]
    held = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    shape.fp8, fp8 = False, shape.fp8
    results.append(tensors.call(*wide, "cpu", **held))
    shape.fp8 = fp8
    (out, lse), (wanted, wanted_lse) = results
    out, lse, finite = out.float().cpu(), lse.cpu(), torch.isfinite(wanted_lse)
    assert torch.equal(torch.isfinite(lse), finite)
    assert not finite.any() or (lse - wanted_lse)[finite].abs().max() < 2e-2
    bound = (4 if fp8 else 1) * TOLERANCE[shape.dtype] * max(1.0, wanted.abs().max().item())
    assert (out - wanted).abs().max() < bound, f"{shape}"


@pytest.mark.parametrize("seed", range(CASES // 2))
def test_results(seed, device):
    shape = drawn(1000 + seed)
    shape.p = min(shape.p, 0.9)
    compare(Tensors(shape, device, seed), device, dropout_p=shape.p, rng_state=(seed, 7))


@pytest.mark.parametrize("width", [32, 80, 96, 192, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes(width, dtype, device):
    shape = Shape([(100, 260)], (4, 2), width, dtype, 0.3, options={"causal": True})
    tensors = Tensors(shape, device)
    compare(tensors, device, dropout_p=0.3, rng_state=(5, 6))
    visible = tensors.seen(device)
    kept = tensors.seen(device, dropout_p=0.3, rng_state=(5, 6))
    assert torch.equal(kept, visible & ~dropped((5, 6), 0.3, *visible.shape, device))


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("feature", ["softcap", "alibi_slopes", "sinks", "attention_chunk", "rel_logits"])
def test_features(feature, rows, device):
    shape = Shape([(rows, 400)] * 2, (8, 2), 128, torch.bfloat16, 0.5, options={"causal": True})
    value = {
        "softcap": 8.0,
        "attention_chunk": 70,
        "alibi_slopes": torch.rand(8, generator=torch.Generator().manual_seed(1)) * 0.2,
        "sinks": torch.randn(8, generator=torch.Generator().manual_seed(1)),
        "rel_logits": torch.randn(2, rows, 8, 33, generator=torch.Generator().manual_seed(1)),
    }[feature]
    given = {feature: value.to(device) if isinstance(value, torch.Tensor) else value}
    compare(Tensors(shape, device), device, **given, dropout_p=0.5, rng_state=(8, 9))


@pytest.mark.parametrize("functions", ["score", "mask", "both"])
@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("width", [64, 128])
def test_functions(width, rows, functions, device):
    def score(score, b, h, i, j, info, aux):
        return score - 0.01 * (h + 1) * abs(i - j)

    def mask(b, h, i, j, info, aux):
        return (i + 150 >= j) & (j % 5 != 2)

    shape = Shape([(rows, 333)] * 2, (4, 2), width, torch.bfloat16, 0.5)
    given = {} if functions == "mask" else {"score_mod": score}
    given |= {} if functions == "score" else {"mask_mod": mask}
    tensors, dropout = Tensors(shape, device), {"dropout_p": 0.5, "rng_state": (11, 12)}
    compare(tensors, device, **given, **dropout)
    q, k, v = (x.to(device) for x in tensors.qkv)
    _, _, p = flashspark.flash_attn_func(q, k, v, **given, **dropout, return_attn_probs=True)
    assert torch.equal(p < 0, dropped((11, 12), 0.5, *p.shape, device))
    plain, drops = tensors.seen(device, **given), dropped((11, 12), 0.5, *p.shape, device)
    assert torch.equal(tensors.seen(device, **given, **dropout), plain & ~drops)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attn_probs(dtype, varlen, device):
    lengths = [(90, 300), (40, 7)] if varlen else [(90, 300)] * 2
    shape = Shape(lengths, (4, 2), 64, dtype, 0.2, varlen, options={"causal": True})
    tensors = Tensors(shape, device)
    results = tensors.call(*tensors.qkv, device, dropout_p=0.2, rng_state=(1, 2), return_attn_probs=True)
    p = results[2]
    assert p.shape == (2, 4, 90, 300) and p.dtype == dtype
    q, k, _ = (x.double().to(device) for x in tensors.qkv)
    for b, (i, j) in enumerate(lengths):
        keys = k[b, :j].repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q[b, :i], keys) / 8
        hidden = torch.ones(i, j, dtype=torch.bool, device=device).triu(j - i + 1)
        want = torch.softmax(scores.masked_fill(hidden, -float("inf")), -1).nan_to_num()
        assert (p[b, :, :i, :j].abs() - want).abs().max() < TOLERANCE[dtype]
        assert torch.equal(p[b, :, :i, :j] < 0, dropped((1, 2), 0.2, 2, 4, i, j, device)[b])
        assert not p[b, :, i:].any() and not p[b, :, :, j:].any()


def test_runs_and_forms_of_a_state_agree(device):
    shape = Shape([(130, 500)] * 2, (8, 2), 128, torch.bfloat16, 0.5, options={"causal": True})
    q, k, v = (x.to(device) for x in Tensors(shape, device).qkv)
    state = torch.tensor([2**62 + 1, 5], device=device)
    outs = [flashspark.flash_attn_func(q, k, v, 0.5, rng_state=s) for s in (state, (2**62 + 1, 5), state.clone())]
    assert all(torch.equal(x, outs[0]) for x in outs)
    assert not torch.equal(flashspark.flash_attn_func(q, k, v, 0.5, rng_state=(2**62 + 1, 6)), outs[0])
    torch.manual_seed(3)
    first, second = (flashspark.flash_attn_func(q, k, v, 0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(flashspark.flash_attn_func(q, k, v, 0.5), first) and not torch.equal(first, second)


@pytest.mark.needs_gpu
def test_nothing_waits(device):
    q, k, v = (torch.randn(1, 64, 4, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    call = lambda: [flashspark.flash_attn_func(q, k, v, 0.5, rng_state=s) for s in (None, (1, 2))]  # noqa: E731
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs_gpu
@pytest.mark.parametrize("rows", [1, 200])
def test_a_graph_draws_again(rows, device):
    """torch registers its generator with the graph: every replay advances it."""
    q = torch.randn(2, rows, 8, 128, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 600, 2, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(q)
    call = lambda: flashspark.flash_attn_func(q, k, v, 0.5, out=out)  # noqa: E731
    call()
    replay = captured(call)
    outs = []
    for _ in range(2):
        torch.cuda.manual_seed(7)
        for _ in range(3):
            replay()
            outs.append(out.clone())
    assert all(torch.equal(x, y) for x, y in zip(outs[:3], outs[3:]))
    assert not any(torch.equal(outs[0], x) for x in outs[1:3])


@pytest.mark.needs_gpu
@pytest.mark.parametrize("rows", [1, 200])
def test_a_graph_reads_the_state(rows, device):
    q = torch.randn(2, rows, 8, 128, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 600, 2, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    out, state = torch.empty_like(q), torch.zeros(2, dtype=torch.int64, device=device)
    call = lambda: flashspark.flash_attn_func(q, k, v, 0.5, rng_state=state, out=out)  # noqa: E731
    call()
    replay = captured(call)
    for numbers in ((1, 2), (2**62, 2), (-3, 1)):
        state.copy_(torch.tensor(numbers))
        replay()
        assert torch.equal(out, flashspark.flash_attn_func(q, k, v, 0.5, rng_state=numbers))


def test_errors(device):
    q, k, v = (torch.randn(1, 16, 2, 64, device=device).to(torch.bfloat16) for _ in range(3))
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="dropout_p = "):
            flashspark.flash_attn_func(q, k, v, p)
    if device.type == "cuda":
        with pytest.raises(ValueError, match=r"rng_state\.device = cpu"):
            flashspark.flash_attn_func(q, k, v, 0.5, rng_state=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"rng_state\.dtype = int32"):
        flashspark.flash_attn_func(q, k, v, 0.5, rng_state=torch.zeros(2, dtype=torch.int32, device=device))
