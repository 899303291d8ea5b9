"""Gradients on the GPU: each is at most twice as far from float64's as torch's own bf16 (fp16) attention is.

Float64's are of the out that the backward pass is given, torch's own of its own."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import flashspark
import pytest
import torch
from problem import ON_CPU
from test_dropout import dropped

CASES = int(os.environ.get("FLASHSPARK_BACKWARD_CASES", "12" if ON_CPU else "300"))
STATE = (2**40 + 77, 5)


@dataclass
class Case:
    """lengths: query tokens and keys of each sequence."""

    lengths: list[tuple[int, int]]
    heads: tuple[int, int]
    width: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.bfloat16
    _: KW_ONLY
    varlen: bool = False
    spread: float = 1.0
    p: float = 0.0
    sinks: bool = False
    dlse: bool = False
    alibi: str = ""  # heads, sequences: what has slopes of its own
    rel: int = 0  # rel_extent
    prefix: str = ""  # per_seq, per_token
    rswa: int = 0
    score: Callable[..., Any] | None = None  # the user's, in FlashAttention 4's form, of aux0 and aux1
    mask: Callable[..., Any] | None = None  # the same for all sequences and heads
    options: dict[str, Any] = field(default_factory=dict)


OTHER_INPUTS = ("sinks", "rel_logits", "alibi_slopes", "aux0", "aux1")


@dataclass
class Tensors:
    """Of all sequences, one behind the other: rows as (tokens, heads, width)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    sinks: torch.Tensor | None = None
    dlse: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    rel_logits: torch.Tensor | None = None  # (tokens, heads, extent)
    prefix_ranges: torch.Tensor | None = None  # (B, ranges, 2) or (tokens, 2)
    rswa_prefix_lens: torch.Tensor | None = None
    aux0: torch.Tensor | None = None  # what `score` captures
    aux1: torch.Tensor | None = None

    def wanted(self) -> list[str]:
        return ["q", "k", "v"] + [x for x in OTHER_INPUTS if getattr(self, x) is not None]


def keeps(case: Case, t: Tensors, b: int, i: int, j: int, first: int) -> torch.Tensor:
    """bool (i, j): the mask of a sequence whose tokens begin with `first`."""
    kept = built_in_mask(case, t, b, i, j, first)
    if case.mask is None:
        return kept
    row, key = torch.arange(i, device=kept.device)[:, None], torch.arange(j, device=kept.device)
    return kept & case.mask(b, 0, row, key, None, None)


def built_in_mask(case: Case, t: Tensors, b: int, i: int, j: int, first: int) -> torch.Tensor:
    device = t.q.device
    pos, key = torch.arange(i, device=device)[:, None] + j - i, torch.arange(j, device=device)
    if case.rswa:
        return (key <= pos) & ((key < t.rswa_prefix_lens[b]) | (pos - key < case.rswa))
    kept = torch.ones(i, j, dtype=torch.bool, device=device)
    left, right = case.options.get("window_size", (-1, -1))
    in_left = key >= pos - left if left >= 0 else kept
    if case.options.get("causal"):
        kept = kept & (key <= pos)
    kept = kept & in_left
    if right >= 0:
        kept = kept & (key <= pos + right)
    chunk = case.options.get("attention_chunk", 0)
    if chunk:
        kept = kept & (torch.div(key, chunk, rounding_mode="floor") == torch.div(pos, chunk, rounding_mode="floor"))
    if not case.prefix:
        return kept
    if case.prefix == "per_token":
        ranges = t.prefix_ranges[first : first + i]
        shown = (key >= ranges[:, :1]) & (key <= ranges[:, 1:])
    else:
        shown = torch.zeros_like(kept)
        for start, end in t.prefix_ranges[b].tolist():
            shown = shown | ((pos >= start) & (pos <= end) & (key >= start) & (key <= end))
    return kept | (shown & in_left if case.options.get("prefix_clamp_window") else shown)


def biases(case: Case, t: Tensors, b: int, i: int, j: int, first: int, dtype: torch.dtype):
    """(heads, i, j), or 0: what is added to scores."""
    distance = torch.arange(i, device=t.q.device)[:, None] + j - i - torch.arange(j, device=t.q.device)
    total = 0
    if case.alibi:
        slopes = t.alibi_slopes[b] if case.alibi == "sequences" else t.alibi_slopes
        total = total - (slopes[:, None, None] * distance.abs()).to(dtype)
    if case.rel:
        at = distance.clamp(0, case.rel - 1).expand(t.q.shape[1], i, j)
        rel = t.rel_logits[first : first + i].transpose(0, 1).gather(2, at)
        total = total + torch.where((distance >= 0) & (distance < case.rel), rel, 0).to(dtype)
    return total


def attention(case: Case, t: Tensors, b: int, rows: slice, keys: slice):
    """out and lse (i, heads) of one sequence, in the type of its tensors."""
    q, k, v = t.q[rows], t.k[keys], t.v[keys]
    (i, heads, width), j = q.shape, k.shape[0]
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * case.options.get("softmax_scale", width**-0.5)
    cap = case.options.get("softcap", 0.0)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores + biases(case, t, b, i, j, rows.start, scores.dtype)
    if case.score is not None:
        h, row, key = (torch.arange(n, device=q.device) for n in (heads, i, j))
        lengths = SimpleNamespace(seqlen_q=i, seqlen_k=j)
        modified = case.score(scores, b, h[:, None, None], row[:, None], key, lengths, [t.aux0, t.aux1])
        scores = modified.to(scores.dtype)
    scores = scores.masked_fill(~keeps(case, t, b, i, j, rows.start), -torch.inf)
    if t.sinks is not None:
        scores = torch.cat([scores, t.sinks.to(scores.dtype)[:, None, None].expand(heads, i, 1)], -1)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])[..., :j]
    if case.p:
        drop = dropped(STATE, case.p, b + 1, heads, i, j, q.device)[b]
        p = p.masked_fill(drop, 0) / (1 - case.p)
    return torch.einsum("hij,jhd->ihd", p.to(v.dtype), v), lse.t()


def make_ranges(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Some of them empty, or beyond the keys."""
    shape = (len(case.lengths), 3) if case.prefix == "per_seq" else (sum(n[0] for n in case.lengths),)
    longest = max(n[1] for n in case.lengths)
    start = torch.randint(0, longest, shape, generator=generator)
    end = start + torch.randint(-5, 90, shape, generator=generator)
    return torch.stack([start, end], -1).int()


def make(case: Case, seed: int, device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    tokens, keys = (sum(n[x] for n in case.lengths) for x in (0, 1))
    (heads, heads_kv), (width, width_v) = case.heads, case.width
    q, k = normal(tokens, heads, width) * case.spread, normal(keys, heads_kv, width)
    v, dout = normal(keys, heads_kv, width_v), normal(tokens, heads, width_v)
    t = Tensors(*(x.to(case.dtype) for x in (q, k, v, dout)))
    if case.sinks:
        t.sinks = normal(heads)
    if case.dlse:
        t.dlse = normal(tokens, heads)
    if case.alibi:
        t.alibi_slopes = 0.1 * (normal(len(case.lengths), heads) if case.alibi == "sequences" else normal(heads))
    if case.rel:
        t.rel_logits = normal(tokens, heads, case.rel)
    if case.prefix:
        t.prefix_ranges = make_ranges(case, generator).to(device)
    if case.rswa:
        longest = max(n[1] for n in case.lengths)
        t.rswa_prefix_lens = torch.randint(0, longest, (len(case.lengths),), generator=generator).int().to(device)
    return t


def by_formula(case: Case, dtype: torch.dtype, given: Tensors, made: torch.Tensor | None = None):
    """Gradients of given.wanted(), by torch's autograd; with `made`, from this out, as the interface says.

    An out that is not the formula's adds the same to all ds of a row as a gradient of its lse does.
    """
    t, names = replace(given), given.wanted()
    for name in names:
        kind = dtype if name in ("q", "k", "v") else torch.float64
        setattr(t, name, getattr(t, name).to(kind, copy=True).requires_grad_())
    i = j = 0
    total = torch.zeros((), dtype=torch.float64, device=t.q.device)
    for b, (rows, keys) in enumerate(case.lengths):
        mine = slice(i, i + rows)
        out, lse = attention(case, t, b, mine, slice(j, j + keys))
        dout = t.dout[mine].double()
        total = total + (out.double() * dout).sum()
        dlse = torch.zeros_like(lse, dtype=torch.float64) if t.dlse is None else t.dlse[mine].double()
        if made is not None:
            dlse = dlse + ((out.detach().double() - made[mine].double()) * dout).sum(-1)
        lse = lse.double()  # rows without keys have no gradient
        total = total + (torch.where(lse == -torch.inf, 0, lse) * dlse).sum()
        i, j = i + rows, j + keys
    inputs = [getattr(t, name) for name in names]
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients)]


def by_flashspark(case: Case, t: Tensors):
    """out, and the gradients of t.wanted()."""
    options = {**case.options, "dropout_p": case.p, "rng_state": STATE if case.p else None}
    options |= {"rswa_window": case.rswa, "alibi_slopes": t.alibi_slopes, "prefix_ranges": t.prefix_ranges}
    options |= {"rel_logits": t.rel_logits, "rswa_prefix_lens": t.rswa_prefix_lens, "learnable_sink": t.sinks}
    wanted, dlse = t.wanted(), t.dlse
    if case.varlen:
        cu = [
            torch.tensor([0, *torch.tensor([n[x] for n in case.lengths]).cumsum(0)], dtype=torch.int32).to(t.q.device)
            for x in (0, 1)
        ]
        lengths = (*cu, *(max(n[x] for n in case.lengths) for x in (0, 1)))
        out, lse = flashspark.flash_attn_varlen_func(t.q, t.k, t.v, *lengths, return_softmax_lse=True, **options)
        dlse = None if dlse is None else dlse.t().contiguous()
        return out, flashspark.flash_attn_varlen_backward(
            t.dout, t.q, t.k, t.v, out, lse, *lengths, dlse=dlse, wanted=wanted, **options
        )
    batch = len(case.lengths)
    q, k, v, dout = (x.view(batch, -1, *x.shape[1:]) for x in (t.q, t.k, t.v, t.dout))
    if case.rel:
        options["rel_logits"] = t.rel_logits.view(batch, -1, *t.rel_logits.shape[1:])
    out, lse = flashspark.flash_attn_func(q, k, v, return_softmax_lse=True, **options)
    dlse = None if dlse is None else dlse.view(batch, -1, dlse.shape[1]).transpose(1, 2).contiguous()
    given = flashspark.flash_attn_backward(dout, q, k, v, out, lse, dlse=dlse, wanted=wanted, **options)
    gradients = [g.flatten(0, 1) if name in ("q", "k", "v", "rel_logits") else g for name, g in zip(wanted, given)]
    return out.flatten(0, 1), gradients


def unused_biases(case: Case, t: Tensors) -> torch.Tensor:
    """bool (tokens, heads, extent): elements of rel_logits whose row keeps no key at their distance."""
    parts, first = [], 0
    for b, (i, j) in enumerate(case.lengths):
        key = torch.arange(i, device=t.q.device)[:, None] + j - i - torch.arange(case.rel, device=t.q.device)
        there = (key >= 0) & (key < j)
        parts.append(~(there & keeps(case, t, b, i, j, first).gather(1, key.clamp(0, j - 1))))
        first += i
    return torch.cat(parts)[:, None, :].expand_as(t.rel_logits)


def check(case: Case, seed: int, device: torch.device):
    tensors = make(case, seed, device)
    out, got = by_flashspark(case, tensors)
    exact = by_formula(case, torch.float64, tensors)
    want = by_formula(case, torch.float64, tensors, out)
    peer = by_formula(case, case.dtype, tensors)
    compare(case, tensors.wanted(), got, want, exact, peer, seed, unused_biases(case, tensors) if case.rel else None)


def compare(case: Case, names, got, want, exact, peer, seed: int, unused=None):
    """unused: elements of rel_logits that no kept key has."""
    for name, x, y, true, other in zip(names, got, want, exact, peer):
        assert torch.isfinite(x).all(), f"d{name} of {case}"
        if name == "rel_logits":  # of distances that no kept key has
            assert (x[unused] == 0).all(), f"d{name} of {case}"
        scale = y.abs().max().item()
        error, allowed = (x.double() - y).abs().max().item(), (other.double() - true).abs().max().item()
        # A result is rounded once in any case. Where the exact gradient is 0 (rows with one key), so is torch's, and
        # the wanted one is what the rounding of out makes: then dS is rounded, too, which is all of it.
        roundings = 2 if true.abs().max().item() < 1e-9 else 1
        unit = 0 if name not in ("q", "k", "v") else 2**-8 if case.dtype == torch.bfloat16 else 2**-11
        bound = max(2 * allowed, roundings * unit * scale) + 1e-5 * scale + 1e-6
        assert error <= bound, f"d{name}: {error} > {bound} of {scale}, {case}, seed {seed}"


def lengths(*pairs: tuple[int, int]) -> list[tuple[int, int]]:
    return list(pairs)


NAMED = {
    "square": Case(lengths((256, 256)), (2, 2)),
    "causal": Case(lengths((384, 384), (384, 384)), (4, 4), options={"causal": True}),
    "bottom-right": Case(lengths((100, 333)), (2, 2), options={"causal": True}),
    "more rows than keys": Case(lengths((333, 100)), (2, 2), options={"causal": True}),
    "gqa": Case(lengths((200, 300)), (8, 2), options={"causal": True}),
    "mqa": Case(lengths((200, 300)), (5, 1)),
    "d64": Case(lengths((300, 300)), (3, 3), (64, 64), options={"causal": True}),
    "d96": Case(lengths((300, 300)), (3, 3), (96, 96), options={"causal": True}),
    "d80": Case(lengths((300, 300)), (3, 3), (80, 80)),
    "d192/128": Case(lengths((300, 300)), (3, 3), (192, 128), options={"causal": True}),
    "d256": Case(lengths((300, 300)), (4, 2), (256, 256), options={"causal": True}),
    "d256 varlen": Case(lengths((1, 1), (77, 130), (300, 200)), (3, 3), (256, 256), varlen=True),
    "d128/64": Case(lengths((300, 300)), (3, 3), (128, 64)),
    "fp16": Case(lengths((300, 300)), (3, 3), dtype=torch.float16, options={"causal": True}),
    "window": Case(lengths((400, 400)), (2, 2), options={"window_size": (50, 20)}),
    "causal window": Case(lengths((400, 400)), (2, 2), options={"window_size": (64, 0)}),
    "softcap": Case(lengths((300, 300)), (2, 2), spread=3, options={"softcap": 5.0, "causal": True}),
    "dropout": Case(lengths((300, 300)), (4, 2), p=0.2, options={"causal": True}),
    "dropout, whole blocks": Case(lengths((700, 500)), (4, 2), p=0.1),
    "dropout, fp16": Case(lengths((300, 300)), (4, 2), dtype=torch.float16, p=0.3, options={"causal": True}),
    "dropout, parts of tiles": Case(lengths((1024, 1024)), (16, 8), p=0.1, options={"causal": True}),
    "dropout, varlen": Case(
        lengths((1, 1), (77, 130), (400, 300)), (4, 2), varlen=True, sinks=True, dlse=True, p=0.9,
        options={"causal": True, "window_size": (100, 0)},
    ),
    "dropout, deterministic": Case(lengths((300, 300)), (4, 2), p=0.2, options={"causal": True, "deterministic": True}),
    "nearly all dropped": Case(lengths((300, 300)), (2, 2), p=0.995),
    "much dropout": Case(lengths((130, 200), (130, 200)), (2, 2), (64, 64), p=0.8),
    "softcap, dropout": Case(lengths((300, 300)), (2, 2), (96, 96), p=0.3, options={"softcap": 5.0}),
    "sinks": Case(lengths((300, 300)), (4, 2), sinks=True, options={"causal": True}),
    "gradient of lse": Case(lengths((300, 300)), (4, 2), dlse=True, options={"causal": True}),
    "varlen": Case(lengths((1, 1), (77, 130), (300, 300), (5, 260)), (4, 2), varlen=True, options={"causal": True}),
    "varlen, all": Case(
        lengths((1, 1), (77, 130), (300, 300)), (4, 2), varlen=True, sinks=True, dlse=True, p=0.1,
        options={"causal": True, "softcap": 10.0, "window_size": (100, 0)},
    ),
    "peaked": Case(lengths((300, 300)), (2, 2), spread=8, options={"causal": True}),
    "softcap, d256": Case(lengths((200, 300)), (2, 2), (256, 256), spread=3, options={"softcap": 5.0, "causal": True}),
    "dropout, d192/128": Case(lengths((300, 300)), (4, 2), (192, 128), p=0.2, options={"causal": True}),
    "alibi": Case(lengths((300, 300)), (4, 2), alibi="heads", options={"causal": True}),
    "alibi by sequence": Case(lengths((200, 300), (200, 300)), (3, 3), (64, 64), alibi="sequences"),
    "alibi, d256": Case(lengths((1, 1), (77, 130), (300, 200)), (4, 2), (256, 256), varlen=True, alibi="sequences"),
    "rel": Case(lengths((300, 300)), (4, 2), rel=128, options={"causal": True}),
    "rel of every distance": Case(lengths((100, 200), (100, 200)), (2, 2), (64, 64), rel=300),
    "rel, d256": Case(lengths((1, 1), (77, 130), (300, 200)), (2, 1), (256, 256), varlen=True, rel=64),
    "prefix": Case(lengths((300, 300), (300, 300)), (2, 2), prefix="per_seq", options={"causal": True}),
    "prefix by token": Case(
        lengths((1, 1), (77, 130), (300, 300)), (4, 2), varlen=True, prefix="per_token", options={"causal": True}
    ),
    "prefix in a window": Case(
        lengths((300, 300)), (2, 2), (96, 96), prefix="per_seq",
        options={"causal": True, "window_size": (50, 0), "prefix_clamp_window": True},
    ),
    "rswa": Case(lengths((300, 300), (300, 300)), (2, 2), rswa=40),
    "chunks": Case(lengths((200, 300)), (2, 2), (64, 64), options={"causal": True, "attention_chunk": 70}),
    "everything": Case(
        lengths((1, 1), (77, 130), (300, 300)), (4, 2), varlen=True, sinks=True, dlse=True, p=0.1, alibi="sequences",
        rel=100, prefix="per_token", options={"causal": True, "softcap": 10.0, "attention_chunk": 90},
    ),
    "one token": Case(lengths((1, 1)), (2, 2)),
    "decode": Case(lengths((1, 777)), (8, 2), options={"causal": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_gradients(name, device):
    check(NAMED[name], 1, device)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("tokens", [1023, 2048, 4097])
def test_long_sequences(tokens, device):
    for causal in (False, True):
        check(Case(lengths((tokens, tokens)), (2, 1), options={"causal": causal}), tokens, device)


def random_case(rng: random.Random) -> Case:
    width = rng.choice([64, 128, 8 * rng.randint(1, 16), 8 * rng.randint(17, 32)])
    most = 70 if ON_CPU else 500
    varlen = rng.random() < 0.5
    count = rng.randint(1, 5)
    # Of a row with one key ds is the difference of equal numbers: where all are so, rounding is all that is left.
    pairs = [(rng.randint(1, most), rng.randint(4, most)) for _ in range(count)]
    group, heads_kv = rng.choice([1, 1, 2, 4, 5]), rng.randint(1, 3)
    options: dict[str, Any] = {"causal": rng.random() < 0.5}
    if rng.random() < 0.3:
        options["window_size"] = (rng.choice([-1, rng.randint(0, 200)]), rng.choice([-1, 0, rng.randint(0, 100)]))
    if rng.random() < 0.2:
        options["softcap"] = rng.choice([2.0, 10.0])
    extent, alibi = rng.choice([0, 0, rng.randint(1, 150)]), rng.choice(["", "", "heads", "sequences"])
    mask = rng.choice(["", "", "per_seq", "per_token", "rswa", "chunks", "per_seq chunks"])
    p = rng.choice([0.0, 0.0, 0.1, 0.5])
    if rng.random() < 0.15:  # dropout alone, which has a kernel of its own
        width, extent, alibi, mask, p = rng.choice([128, 8 * rng.randint(13, 16)]), 0, "", "", rng.choice([0.1, 0.8])
        options.pop("softcap", None)
    if "chunks" in mask:
        options["attention_chunk"] = rng.randint(4, 200)  # of a row with one key only rounding remains
    if mask.startswith("per_"):
        options["prefix_clamp_window"] = rng.random() < 0.3
    if mask == "rswa":
        options = {name: x for name, x in options.items() if name == "softcap"}
    return Case(
        pairs if varlen else [pairs[0]] * count,
        (group * heads_kv, heads_kv),
        (width, width if rng.random() < 0.8 else 8 * rng.randint(1, 16)),
        rng.choice([torch.bfloat16, torch.float16]),
        varlen=varlen,
        spread=rng.choice([1.0, 1.0, 4.0]),
        p=p,
        sinks=rng.random() < 0.2,
        dlse=rng.random() < 0.2,
        alibi=alibi,
        rel=extent,
        prefix=mask.split()[0] if mask.startswith("per_") else "",
        rswa=rng.randint(1, 60) if mask == "rswa" else 0,
        options=options,
    )


def test_random_batches(device):
    for seed in range(CASES):
        check(random_case(random.Random(seed)), seed, device)


@pytest.mark.needs_gpu
def test_gradients_are_written_whole(device):
    """Of tensors with rows that belong to no sequence, whatever memory held before."""
    q, k, v, dout = (torch.randn(100, 2, 64, device=device, dtype=torch.bfloat16) for _ in range(4))
    cu = torch.tensor([10, 50, 90], dtype=torch.int32, device=device)
    used = torch.tensor([30, 0], dtype=torch.int32, device=device)
    arguments = (cu, cu, 40, 40)
    out, lse = flashspark.flash_attn_varlen_func(
        q, k, v, *arguments, seqused_q=used, seqused_k=used, return_softmax_lse=True
    )
    made = [torch.full_like(q, torch.nan) for _ in range(3)]
    given = flashspark.flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *arguments, seqused_q=used, seqused_k=used, dq=made[0], dk=made[1], dv=made[2]
    )
    for x in given:
        assert torch.isfinite(x).all()
        assert (x[:10] == 0).all() and (x[40:] == 0).all() and (x[10:40] != 0).any()


@pytest.mark.needs_gpu
def test_a_captured_call_replays(device):
    q, k, v, dout = (torch.randn(2, 200, 4, 128, device=device, dtype=torch.bfloat16) for _ in range(4))
    out, lse = flashspark.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    options = {"causal": True, "deterministic": True}
    want = flashspark.flash_attn_backward(dout, q, k, v, out, lse, **options)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        got = flashspark.flash_attn_backward(dout, q, k, v, out, lse, **options)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(got, want):
        assert torch.equal(x, y)


DETERMINISTIC = {
    "causal": Case(lengths((700, 700)), (4, 2), options={"causal": True}),
    "full, d64": Case(lengths((700, 700), (700, 700)), (4, 4), (64, 64)),
    "window, varlen": Case(
        lengths((900, 900), (1, 1), (333, 500)), (4, 2), varlen=True, options={"causal": True, "window_size": (100, 0)}
    ),
    "full, walks": Case(lengths((1020, 1100)), (8, 4)),
    "causal, walks": Case(lengths((1024, 1024)), (16, 8), options={"causal": True}),
    "causal, walks of four heads": Case(lengths((700, 700), (700, 700)), (8, 2), options={"causal": True}),
    "full, turns": Case(lengths((900, 1100), (1300, 700)), (8, 2), varlen=True),
    "causal, turns": Case(lengths((1500, 1500), (900, 900)), (4, 4), varlen=True, options={"causal": True}),
    "d256": Case(lengths((300, 500)), (4, 2), (256, 256), options={"causal": True}),
    "d192": Case(lengths((1200, 1200)), (4, 2), (192, 192), options={"causal": True}),
    "d256, many turns": Case(lengths((1500, 1700)), (8, 8), (256, 256)),
    "d256, varlen": Case(lengths((1500, 1500), (900, 500)), (4, 4), (256, 256), varlen=True, options={"causal": True}),
    "dropout, sinks, alibi": Case(
        lengths((500, 500), (500, 500)), (6, 3), alibi="heads", sinks=True, p=0.2, options={"causal": True}
    ),
    "rswa": Case(lengths((600, 600)), (2, 2), rswa=70, options={"causal": True}),
    "prefix": Case(lengths((600, 600)), (2, 2), prefix="per_seq", options={"causal": True}),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_gradients_have_the_same_bits(name, device):
    case = DETERMINISTIC[name]
    case.options["deterministic"] = True
    check(case, 5, device)
    tensors = make(case, 5, device)
    _, first = by_flashspark(case, tensors)
    for _ in range(3 if ON_CPU else 50):
        assert all(map(torch.equal, by_flashspark(case, tensors)[1], first))
