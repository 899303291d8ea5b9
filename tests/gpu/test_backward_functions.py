"""Gradients through score functions, mask functions and block lists: of q, k, v and of what score functions capture.

Each is at most twice as far from float64's as that of the same formula in torch, in the tensors' own type, or as that
in float64 with `out` rounded to this type, from which a backward pass takes it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import flashspark
import pytest
import torch
from problem import ON_CPU
from torch.nn.attention import flex_attention as torch_flex

RANDOM_CASES = int(os.environ.get("FLASHSPARK_BACKWARD_CASES", "6" if ON_CPU else "60"))
LENGTH = 90 if ON_CPU else 333
HEADS, BATCH = 4, 2


def scores(t):
    """Score functions by name, and which of the tensors `t` each one captures."""
    return {
        "none": (None, ""),
        "alibi": (lambda s, b, h, q, k: s + t["slopes"][h] * (k - q), "slopes"),
        "relative position": (
            lambda s, b, h, q, k: s + t["relative"][h, torch.clamp(q - k + 32, 0, 63)],
            "relative",
        ),
        "table": (lambda s, b, h, q, k: s + t["table"][b, h, q, k], "table"),
        "softcap": (lambda s, b, h, q, k: t["cap"] * torch.tanh(s / t["cap"]), "cap"),
        "temperature": (lambda s, b, h, q, k: s * torch.sigmoid(t["rows"][h, q]) + t["keys"][k], "rows keys"),
        "one tensor twice": (lambda s, b, h, q, k: s + t["keys"][q] * t["keys"][k], "keys"),
        "waves": (lambda s, b, h, q, k: s + t["slopes"][h] * torch.sin(0.1 * (q - k)) * torch.exp(-s * s), "slopes"),
        "minus infinity": (
            lambda s, b, h, q, k: torch.where((q + k) % 5 == 2, -math.inf, s * t["keys"][k]),
            "keys",
        ),
    }


def masks(t):
    return {
        "none": None,
        "causal": lambda b, h, q, k: q >= k,
        "documents": lambda b, h, q, k: t["documents"][b, q] == t["documents"][b, k],
        "by head": lambda b, h, q, k: ((q - k) % (h + 1) == 0) | (k < 4),
        "nothing for some": lambda b, h, q, k: (q % 7 != 0) & (k + 40 > q),
    }


def captured(length: int, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make)

    t = {
        "slopes": normal(HEADS).abs() / 16,
        "relative": normal(HEADS, 64).to(dtype),
        "table": normal(BATCH, HEADS, length, length).to(dtype),
        "cap": torch.tensor(3.0),
        "rows": normal(HEADS, length),
        "keys": normal(length).to(dtype),
        "documents": torch.randint(0, 5, (BATCH, length), generator=make).sort().values,
    }
    return {name: x.to(device) for name, x in t.items()}


@dataclass
class Case:
    score: str
    mask: str
    width: int = 64
    width_v: int = 0  # 0: as width
    heads_kv: int = 2
    length: int = LENGTH
    dtype: torch.dtype = torch.bfloat16
    block: int = 128
    by_head: bool = True  # the mask's lists
    dlse: bool = False


def formula(case: Case, q, k, v, score, mask):
    """out and lse in the tensors' type."""
    group = HEADS // case.heads_kv
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n = case.length
    at = [
        torch.arange(count, device=q.device).view(shape)
        for count, shape in ((BATCH, (BATCH, 1, 1, 1)), (HEADS, (HEADS, 1, 1)), (n, (n, 1)), (n, (n,)))
    ]
    s = (q * case.width**-0.5) @ k.transpose(-1, -2)
    if score is not None:
        s = score(s, *at).to(q.dtype)
    if mask is not None:
        s = s.masked_fill(~mask(*at), -math.inf)
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0)
    p = torch.softmax(s, -1).masked_fill(empty, 0)
    return p @ v, torch.logsumexp(s, -1).masked_fill(empty[..., 0], 0)


def attention(case: Case, q, k, v, score, mask):
    lists = None
    if mask is not None:
        lists = flashspark.create_block_mask(
            mask, BATCH, HEADS if case.by_head else None, case.length, case.length, device=q.device,
            BLOCK_SIZE=case.block,
        )  # fmt: skip
    out, lse = flashspark.flex_attention(q, k, v, score, lists, enable_gqa=True, return_lse=True)
    return out, lse.masked_fill(lse == -math.inf, 0)


def error_of_out(out, dout, lse, given):
    """What makes of a sum's gradients those of the `out` that the backward pass is given: ds = p (dp - dout * out)."""
    return -((dout.double() * (given.double() - out)).sum(-1).detach() * lse).sum()


def gradients(case: Case, function, given, tensors, dout, dlse, dtype, given_out=None):
    """Of q, k, v and of what the function captures; and out. given_out: what the backward pass takes for out."""
    rows = [x.detach().to(dtype, copy=True).requires_grad_() for x in given]
    names = scores({})[case.score][1].split()
    held = dict(tensors)
    for name in names:
        kind = torch.float64 if dtype == torch.float64 else tensors[name].dtype
        held[name] = tensors[name].detach().to(kind, copy=True).requires_grad_()
    out, lse = function(case, *rows, scores(held)[case.score][0], masks(held)[case.mask])
    total = (out.double() * dout.double()).sum()
    if case.dlse:
        total = total + (lse.double() * dlse.double()).sum()
    if given_out is not None:
        total = total + error_of_out(out, dout, lse, given_out)
    total.backward()
    found = dict(zip("qkv", (x.grad for x in rows)))
    return found | {name: held[name].grad for name in names}, out.detach()


def check(case: Case, seed: int, device: torch.device, function=attention):
    make = torch.Generator().manual_seed(seed)
    n, width_v = case.length, case.width_v or case.width
    shapes = [(BATCH, HEADS, n, case.width), (BATCH, case.heads_kv, n, case.width), (BATCH, case.heads_kv, n, width_v)]
    shapes += [(BATCH, HEADS, n, width_v), (BATCH, HEADS, n)]
    q, k, v, dout, dlse = (torch.randn(*s, generator=make).to(device) for s in shapes)
    given = [x.to(case.dtype) for x in (q, k, v)]
    dout = dout.to(case.dtype)
    tensors = captured(n, case.dtype, device, seed)
    got, out = gradients(case, function, given, tensors, dout, dlse, case.dtype)
    want, _ = gradients(case, formula, given, tensors, dout, dlse, torch.float64, out)
    exact, _ = gradients(case, formula, given, tensors, dout, dlse, torch.float64)
    peer, _ = gradients(case, formula, given, tensors, dout, dlse, case.dtype)
    for name, y in want.items():
        x = got[name]
        assert torch.isfinite(x).all(), f"{name} of {case}"
        scale = y.abs().max().item()
        error, allowed = (x.double() - y).abs().max().item(), (peer[name].double() - exact[name]).abs().max().item()
        unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(x.dtype, 2**-14)
        bound = max(2 * allowed, unit * scale) + 1e-5 * scale + 1e-6
        if scale < 1e-9:  # rows of one key: dp and dout * out are the same sum, whose float32 roundings are left
            bound = 2**-20 * (dout.double().abs() @ given[2].double().abs().repeat_interleave(
                HEADS // case.heads_kv, 1).transpose(-1, -2)).max().item()  # fmt: skip
        assert error <= bound, f"{name}: {error} > {bound} of {scale}, {case}, seed {seed}"


@pytest.mark.parametrize("mask", masks({}))
@pytest.mark.parametrize("score", scores({}))
def test_functions(score, mask, device):
    number = list(scores({})).index(score) * 5 + list(masks({})).index(mask)
    check(Case(score, mask, dtype=(torch.bfloat16, torch.float16)[number % 2]), number, device)


@pytest.mark.parametrize(
    "width", [(32, 32), (80, 72), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)], ids=str
)
@pytest.mark.parametrize("score", ["alibi", "relative position", "temperature"])
def test_head_sizes(score, width, device):
    check(Case(score, "documents", width=width[0], width_v=width[1]), width[0], device)


@pytest.mark.parametrize("block", [16, 48, 64, 128, 256])
@pytest.mark.parametrize("by_head", [False, True])
def test_block_sizes(block, by_head, device):
    check(Case("none", "by head" if by_head else "documents", block=block, by_head=by_head, dlse=True), block, device)
    check(Case("table", "by head" if by_head else "documents", width=128, block=block, by_head=by_head), block, device)


@pytest.mark.parametrize("seed", range(RANDOM_CASES))
def test_random(seed, device):
    make = torch.Generator().manual_seed(1000 + seed)

    def of(*values: Any) -> Any:
        return values[int(torch.randint(0, len(values), (), generator=make))]

    case = Case(
        of(*scores({})), of(*masks({})), width=of(32, 64, 96, 128, 128, 256), heads_kv=of(1, 2, 4),
        length=of(1, 17, 64, 65, LENGTH), dtype=of(torch.bfloat16, torch.float16), block=of(16, 32, 128),
        by_head=of(False, True), dlse=of(False, True),
    )  # fmt: skip
    if case.mask == "by head":
        case.by_head = True
    check(case, seed, device)


def through_torch(case: Case, q, k, v, score, mask):
    """As `attention`, by torch's own function."""
    lists = None
    if mask is not None:
        lists = torch_flex.create_block_mask(
            mask, BATCH, HEADS, case.length, case.length, device=q.device, BLOCK_SIZE=128
        )
    with flashspark.flex.redirect_torch_flex_attention():
        out, lse = torch_flex.flex_attention(q, k, v, score, lists, enable_gqa=True, return_lse=True)
    return out, lse.masked_fill(lse == -math.inf, 0)


@pytest.mark.parametrize("score", ["alibi", "relative position", "softcap"])
@pytest.mark.parametrize("mask", ["none", "documents"])
def test_torchs_own_function(score, mask, device):
    check(Case(score, mask), 5, device, through_torch)


# Functions in FlashAttention 4's form, over packed sequences with fewer rows in use.
LENGTHS = [(40, 61), (1, 17), (0, 30), (70, 70)]


def packed_score(score, b, h, q, k, lengths, aux):
    last = q + lengths.seqlen_k - lengths.seqlen_q
    return score + aux[0][h] * (k - last) / 8 + aux[1][k + lengths.offset_k] - aux[1][q + lengths.offset_q]


def packed_mask(b, h, q, k, lengths, aux):
    return (k + h) % 3 != 0


def packed_formula(tensors, aux, dtype, dout, given_out=None):
    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in tensors)
    aux = [x.detach().to(torch.float64, copy=True).requires_grad_() for x in aux]
    i = j = 0
    total = torch.zeros((), dtype=torch.float64, device=q.device)
    for rows, keys in LENGTHS:
        at_q, at_k = torch.arange(rows, device=q.device)[:, None], torch.arange(keys, device=q.device)
        h = torch.arange(HEADS, device=q.device)[:, None, None]
        group = HEADS // k.shape[1]
        s = torch.einsum("ihd,jhd->hij", q[i : i + rows], k[j : j + keys].repeat_interleave(group, 1)) * (
            q.shape[-1] ** -0.5
        )
        s = s.double() + aux[0][h] * (at_k - at_q - keys + rows) / 8 + aux[1][at_k + j] - aux[1][at_q + i]
        s = s.masked_fill((at_k + h) % 3 == 0, -math.inf)
        empty = (s == -math.inf).all(-1, keepdim=True)
        p = torch.softmax(s.masked_fill(empty, 0), -1).masked_fill(empty, 0).to(dtype)
        out = torch.einsum("hij,jhd->ihd", p, v[j : j + keys].repeat_interleave(group, 1))
        total = total + (out.double() * dout[i : i + rows].double()).sum()
        if given_out is not None:
            lse = torch.logsumexp(s.masked_fill(empty, 0), -1).masked_fill(empty[..., 0], 0)
            total = total + error_of_out(out, dout[i : i + rows], lse.t(), given_out[i : i + rows])
        i, j = i + rows, j + keys
    total.backward()
    return [x.grad for x in (q, k, v, *aux)]


@pytest.mark.parametrize("width", [64, 128, 256])
def test_packed_sequences(width, device):
    make = torch.Generator().manual_seed(width)
    tokens, keys = (sum(n[x] for n in LENGTHS) for x in (0, 1))
    shapes = (tokens, HEADS, width), (keys, 2, width), (keys, 2, width), (tokens, HEADS, width)
    q, k, v, dout = (torch.randn(*s, generator=make).to(torch.bfloat16).to(device) for s in shapes)
    aux = [torch.randn(n, generator=make).to(device) for n in (HEADS, 256)]
    exact, peer = (packed_formula((q, k, v), aux, dtype, dout) for dtype in (torch.float64, torch.bfloat16))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *aux)]
    cu = [
        torch.tensor([0, *torch.tensor([n[x] for n in LENGTHS]).cumsum(0)], dtype=torch.int32).to(device)
        for x in (0, 1)
    ]
    out = flashspark.flash_attn_varlen_func(
        *leaves[:3], *cu, max(n[0] for n in LENGTHS), max(n[1] for n in LENGTHS), score_mod=packed_score,
        mask_mod=packed_mask, aux_tensors=leaves[3:],
    )  # fmt: skip
    out.backward(dout)
    want = packed_formula((q, k, v), aux, torch.float64, dout, out.detach())
    for name, leaf, y, true, other in zip(("q", "k", "v", "slopes", "by token"), leaves, want, exact, peer):
        scale = y.abs().max().item()
        error, allowed = (leaf.grad.double() - y).abs().max().item(), (other.double() - true).abs().max().item()
        bound = max(2 * allowed, 2**-8 * scale if name in "qkv" else 0) + 1e-4 * scale + 1e-6
        assert error <= bound, f"{name}: {error} > {bound} of {scale}"


@pytest.mark.needs_gpu
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("width", [64, 128, 200])
def test_deterministic_gradients_have_the_same_bits(width, lists, device):
    tokens, ends = 700, torch.tensor([90, 350, 400, 700], device=device)
    document = torch.bucketize(torch.arange(tokens, device=device), ends, right=True).to(torch.int32)

    def mask(b, h, i, j):
        return (i >= j) & (document[i] == document[j]) | (j < 20)

    make = torch.Generator().manual_seed(width)
    shapes = [(2, heads, tokens, width) for heads in (HEADS, 1, 1, HEADS)]
    q, k, v, dout = (torch.randn(*s, generator=make).to(torch.bfloat16).to(device) for s in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"enable_gqa": True}
    if lists:
        options["block_mask"] = flashspark.create_block_mask(
            mask, 2, None, tokens, tokens, device=device, BLOCK_SIZE=64
        )
    score = None if lists else lambda s, b, h, i, j: s * 1.1 - 0.01 * h * (i - j)

    def gradients():
        out = flashspark.flex_attention(q, k, v, score, **options)
        return torch.autograd.grad(out, leaves, dout)

    free = gradients()
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients()
        for _ in range(20):
            assert all(map(torch.equal, gradients(), first))
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(first, free):  # of the same products, in another order
        assert (x.float() - y.float()).abs().max() < 0.01 * y.float().abs().max()


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("score", [name for name, (_, captured) in scores({}).items() if captured])
def test_deterministic_gradients_of_captured_tensors(score, width, device, deterministic):
    check(Case(score, "documents", width=width), width, device)


def captured_results(score, mask, width, length, device, seed=0):
    """A function that gives gradients of q, k, v and of what a score function captures."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, heads, length, width) for heads in (HEADS, 2, 2, HEADS)]
    q, k, v, dout = (torch.randn(*s, generator=make).to(torch.bfloat16).to(device) for s in shapes)
    held = captured(length, torch.bfloat16, device, seed)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    leaves += [held[name].requires_grad_() for name in scores({})[score][1].split()]
    lists = None
    if mask != "none":
        lists = flashspark.create_block_mask(masks(held)[mask], BATCH, None, length, length, device=device)

    def results():
        out = flashspark.flex_attention(q, k, v, scores(held)[score][0], lists, enable_gqa=True)
        return torch.autograd.grad(out, leaves, dout)

    return results


@pytest.mark.needs_gpu
@pytest.mark.parametrize("mask", ["none", "documents"])
@pytest.mark.parametrize("score", ["alibi", "relative position", "table", "temperature", "one tensor twice", "waves"])
def test_gradients_of_captured_tensors_have_the_same_bits(score, mask, device, deterministic):
    results = captured_results(score, mask, 128, 500, device)
    first = results()
    for n in range(50):
        assert all(map(torch.equal, results(), first)), n


@pytest.mark.needs_gpu
def test_gradients_of_captured_tensors_beside_others(device, deterministic):
    """Two streams at once, and a graph that is replayed: the same bits as alone."""
    results = captured_results("relative position", "none", 64, 700, device)
    other = captured_results("table", "none", 128, 300, device, 1)
    first, first_of_other = results(), other()
    side = torch.cuda.Stream()
    for _ in range(10):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            again = other()
        assert all(map(torch.equal, results(), first))
        torch.cuda.current_stream().wait_stream(side)
        assert all(map(torch.equal, again, first_of_other))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = results()
    for _ in range(10):
        for x in again:
            x.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, again, first))


@pytest.mark.needs_gpu
def test_large_captured_tensors_take_passes(device):
    """Their exact sums take 2 GiB at once."""
    results = captured_results("table", "none", 64, 2100, device)
    free = results()
    torch.use_deterministic_algorithms(True)
    try:
        first = results()
        assert all(map(torch.equal, results(), first))
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(first, free):
        assert (x.float() - y.float()).abs().max() < 0.01 * y.float().abs().max()


@pytest.mark.needs_gpu
def test_gradients_of_captured_tensors_may_be_infinite(device):
    """The elements that are not finite are those that they are without `deterministic`."""
    make = torch.Generator().manual_seed(1)
    table = (torch.rand(300, 300, generator=make) < 0.99).float().to(device).requires_grad_()
    q, k, v, dout = (torch.randn(1, 2, 300, 64, generator=make).to(torch.bfloat16).to(device) for _ in range(4))

    def gradient():  # of sqrt(0) it is infinite; two heads may add infinities of both signs
        out = flashspark.flex_attention(q, k, v, lambda s, b, h, i, j: s + torch.sqrt(table[i, j]))
        return torch.autograd.grad(out, table, dout)[0]

    free = gradient()
    torch.use_deterministic_algorithms(True)
    try:
        exact = gradient()
    finally:
        torch.use_deterministic_algorithms(False)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert kind(free).any() and torch.equal(kind(exact), kind(free))
    rest = free.isfinite()
    assert torch.allclose(exact[rest], free[rest], rtol=1e-5, atol=1e-6)
