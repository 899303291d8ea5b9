"""Gradients of attention on torch tensors that require them, against float64, with every mask and bias. Skipped without
torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import flashspark
import numpy as np
import pytest
from dropout_reference import dropped
from problems import offsets
from reference import Options

torch = pytest.importorskip("torch")

from gradient_reference import DTYPES, assert_within, attend, weighted  # noqa: E402 - it needs torch

STATE = (2**61 + 12345, 9)
GENERATOR = torch.Generator().manual_seed(11)


def random(*shape, scale=1.0):
    return torch.randn(*shape, generator=GENERATOR) * scale


@dataclass
class Problem:
    """Sequences of a call. given: its tensors that have gradients beside q, k and v, in float32. of: their part of one
    sequence, as Options has it. options: other keyword arguments."""

    rows: tuple[int, ...] = (29, 29)
    keys: tuple[int, ...] = (37, 37)
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (32, 32)
    scale: float = 1.0  # of q: large ones make peaked scores
    options: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Any] = field(default_factory=dict)  # of Options, the same for every sequence
    each: tuple[dict[str, Any], ...] = ()  # of Options, by sequence
    given: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0


def sinks():
    return {"sinks": random(4)}


def slopes(*shape):
    return {"alibi_slopes": random(*shape, scale=0.1).abs()}


DENSE = {
    "plain": Problem(),
    "causal": Problem(options={"causal": True}, masks={"causal": True}),
    "causal, more rows": Problem(rows=(37, 37), keys=(20, 20), options={"causal": True}, masks={"causal": True}),
    "window": Problem(options={"window_size": (5, 3)}, masks={"left": 5, "right": 3}),
    "sliding": Problem(options={"causal": True, "window_size": (6, None)}, masks={"causal": True, "left": 6}),
    "softcap": Problem(options={"softcap": 2.0}, masks={"softcap": 2.0}),
    "peaked": Problem(scale=8.0, options={"causal": True}, masks={"causal": True}),
    "scale": Problem(options={"softmax_scale": 0.3}, masks={"softmax_scale": 0.3}),
    "sinks": Problem(given=sinks()),
    "sinks, empty rows": Problem(
        rows=(37, 37), keys=(20, 20), given=sinks(), options={"causal": True}, masks={"causal": True}
    ),
    "ALiBi": Problem(given=slopes(4), options={"causal": True}, masks={"causal": True}),
    "ALiBi by sequence": Problem(given=slopes(2, 4)),
    "relative bias": Problem(
        given={"rel_logits": random(2, 29, 4, 9)}, options={"causal": True}, masks={"causal": True}
    ),
    "chunks": Problem(options={"causal": True, "attention_chunk": 8}, masks={"causal": True}),
    "PrefixLM": Problem(
        options={"causal": True, "prefix_ranges": torch.tensor([[[9, 20]], [[10, 30]]], dtype=torch.int32)},
        masks={"causal": True},
        each=({"ranges": [(9, 20)]}, {"ranges": [(10, 30)]}),
    ),
    "R-SWA": Problem(
        options={"rswa_prefix_lens": torch.tensor([3, 6], dtype=torch.int32), "rswa_window": 5},
        masks={"rswa_window": 5},
        each=({"prefix_len": 3}, {"prefix_len": 6}),
    ),
    "causal by sequence": Problem(
        options={"causal_per_seq": torch.tensor([1, 0], dtype=torch.int32)}, each=({"causal": True}, {})
    ),
    "dropout": Problem(dropout=0.3, options={"causal": True}, masks={"causal": True}),
    "one query": Problem(rows=(1, 1), keys=(70, 70)),
    "one head": Problem(heads=(3, 1), dims=(64, 64)),
    "head sizes of no kernel": Problem(dims=(20, 12), options={"causal": True}, masks={"causal": True}),
    "wide keys": Problem(dims=(192, 128)),
    "no keys": Problem(keys=(0, 0)),
    "everything": Problem(
        given={**sinks(), **slopes(4), "rel_logits": random(2, 29, 4, 9)},
        options={"causal": True, "window_size": (20, 0), "softcap": 5.0},
        masks={"causal": True, "left": 20, "softcap": 5.0},
        dropout=0.2,
    ),
}
LENGTHS = {"rows": (17, 0, 40, 5), "keys": (33, 12, 40, 0)}
VARLEN = {
    "plain": Problem(**LENGTHS),
    "causal": Problem(**LENGTHS, options={"causal": True}, masks={"causal": True}),
    "sliding": Problem(**LENGTHS, options={"window_size": (7, 0)}, masks={"left": 7, "right": 0}),
    "documents": Problem(
        rows=(17, 1, 40, 6), keys=(17, 1, 40, 6), dims=(64, 64), options={"causal": True}, masks={"causal": True}
    ),
    "sinks and ALiBi": Problem(**LENGTHS, given={**sinks(), **slopes(4)}),
    "relative bias": Problem(
        **LENGTHS, given={"rel_logits": random(62, 4, 9)}, options={"causal": True}, masks={"causal": True}
    ),
    "dropout": Problem(**LENGTHS, dropout=0.5, options={"softcap": 3.0}, masks={"softcap": 3.0}),
}  # fmt: skip


def chunk_mask(rows, keys, size):
    positions = torch.arange(rows)[:, None] + keys - rows
    return positions.div(size, rounding_mode="floor") == torch.arange(keys) // size


def leaves(problem, dtype, varlen):
    """q, k, v and what else has a gradient, in the type that a call takes them in."""
    (hq, hkv), (d, dv) = problem.heads, problem.dims
    generator = torch.Generator().manual_seed(5)
    made = {}
    for name, lengths, heads, width in (
        ("q", problem.rows, hq, d), ("k", problem.keys, hkv, d), ("v", problem.keys, hkv, dv)
    ):  # fmt: skip
        shape = (sum(lengths), heads, width) if varlen else (len(lengths), lengths[0], heads, width)
        scale = problem.scale if name == "q" else 1.0
        made[name] = (torch.randn(*shape, generator=generator) * scale).to(dtype)
    for name, x in problem.given.items():
        made[name] = x.clone() if name == "alibi_slopes" else x.to(dtype)
    return made


def by_formula(problem, given, dtype, varlen, want_lse):
    """The gradients by torch's autograd in a type, with out and lse."""
    given = {name: x.detach().to(dtype).requires_grad_() for name, x in given.items()}
    outs, logs = [], []
    starts = [offsets(lengths) for lengths in (problem.rows, problem.keys)]
    for b, (rows, keys) in enumerate(zip(problem.rows, problem.keys)):
        options = dict(problem.masks) | (dict(problem.each[b]) if problem.each else {})
        if varlen:
            at = [slice(start[b], start[b + 1]) for start in starts]
            q, k, v = given["q"][at[0]], given["k"][at[1]], given["v"][at[1]]
        else:
            q, k, v = (given[name][b] for name in "qkv")
        for name in problem.given:
            x = given[name]
            if name == "rel_logits":
                x = x[at[0]] if varlen else x[b]
            options[name] = x[b] if name == "alibi_slopes" and x.dim() == 2 else x
        if problem.dropout:
            options |= {"dropout_p": problem.dropout, "dropped": dropped(STATE, problem.dropout, b, 4, rows, keys)}
        chunk = problem.options.get("attention_chunk")
        keep = None if not chunk else chunk_mask(rows, keys, chunk)
        out, lse = attend(q, k, v, Options(**options), keep)
        outs.append(out)
        logs.append(lse)
    out, lse = (torch.cat(outs), torch.cat(logs, 1)) if varlen else (torch.stack(outs), torch.stack(logs))
    weighted(out, lse if want_lse else None).backward()
    return out, lse, {name: x.grad for name, x in given.items()}


def by_call(problem, given, varlen, want_lse, function=None, **more):
    given = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    options = dict(problem.options) | {"return_softmax_lse": True} | more
    if problem.dropout:
        options |= {"dropout_p": problem.dropout, "rng_state": STATE}
    if varlen:
        cu = [torch.from_numpy(offsets(lengths)) for lengths in (problem.rows, problem.keys)]
        function = function or flashspark.flash_attn_varlen_func
        out, lse = function(
            **given, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], max_seqlen_q=max(problem.rows),
            max_seqlen_k=max(problem.keys), **options,
        )  # fmt: skip
    else:
        out, lse = (function or flashspark.flash_attn_func)(**given, **options)
    assert out.requires_grad and lse.requires_grad
    weighted(out, lse if want_lse else None).backward()
    return out.detach(), lse.detach(), {name: x.grad for name, x in given.items()}


def check(problem, dtype, varlen, want_lse=False, **more):
    given = leaves(problem, dtype, varlen)
    want_out, _, want = by_formula(problem, given, torch.float64, varlen, want_lse)
    _, _, narrow = by_formula(problem, given, dtype, varlen, want_lse)
    out, _, got = by_call(problem, given, varlen, want_lse, **more)
    assert out.shape == want_out.shape
    for name, x in got.items():
        assert x is not None and x.dtype == given[name].dtype, name
        assert_within(x, want[name], narrow[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name, dtype):
    check(DENSE[name], dtype, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARLEN)
def test_varlen(name, dtype):
    check(VARLEN[name], dtype, True)


@pytest.mark.parametrize("name", ["plain", "causal", "sinks", "sinks, empty rows", "dropout", "everything", "no keys"])
def test_lse_has_a_gradient(name):
    """lse is an output like any other, as for attention over parts of the keys, which is joined by it."""
    check(DENSE[name], torch.float32, False, want_lse=True)


def test_lse_alone():
    q, k, v = (leaves(DENSE["causal"], torch.float32, False)[n].requires_grad_() for n in "qkv")
    _, lse = flashspark.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    lse.sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    sum(attend(*(x[b] for x in wide), Options(causal=True))[1].sum() for b in range(2)).backward()
    for x, w in zip((q, k), wide):
        torch.testing.assert_close(x.grad.double(), w.grad, rtol=1e-5, atol=1e-5)
    assert (v.grad == 0).all()


@pytest.mark.parametrize("implementation", ["cpu-reference", None])
@pytest.mark.parametrize("threads", [1, 2])
def test_implementations_and_threads(implementation, threads):
    check(DENSE["everything"], torch.float32, False, implementation=implementation, num_threads=threads)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv", "qv"])
def test_some_gradients_only(wanted):
    problem = DENSE["causal"]
    given = leaves(problem, torch.float32, False)
    _, _, want = by_formula(problem, given, torch.float64, False, False)
    for name in wanted:
        given[name].requires_grad_()
    weighted(flashspark.flash_attn_func(**given, causal=True), None).backward()
    for name, x in given.items():
        assert (x.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(x.grad.double(), want[name], rtol=1e-4, atol=1e-4)


def test_rows_not_in_use():
    """Rows and keys past seqused have gradients of 0, whatever they hold."""
    problem = Problem(rows=(20, 20), keys=(30, 30))
    given = {name: x.requires_grad_() for name, x in leaves(problem, torch.float32, False).items()}
    used_q, used_k = (torch.tensor(n, dtype=torch.int32) for n in ([20, 7], [11, 30]))
    with torch.no_grad():
        given["k"][0, 11:], given["v"][0, 11:], given["q"][1, 7:] = math.nan, math.nan, math.nan
    out = flashspark.flash_attn_func(**given, seqused_q=used_q, seqused_k=used_k, causal=True)
    loss = sum(weighted(out[b, : used_q[b]], None) for b in range(2))
    loss.backward()
    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    loss = 0
    for b in range(2):
        parts = wide["q"][b, : used_q[b]], wide["k"][b, : used_k[b]], wide["v"][b, : used_k[b]]
        loss = loss + weighted(attend(*parts, Options(causal=True))[0], None)
    loss.backward()
    for name, x in given.items():
        torch.testing.assert_close(x.grad.double(), wide[name].grad.nan_to_num(), rtol=1e-4, atol=1e-4)
    assert (given["k"].grad[0, 11:] == 0).all() and (given["q"].grad[1, 7:] == 0).all()


def packed(problem, dtype):
    made = leaves(problem, dtype, False)
    return made["q"], made["k"], made["v"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed(dtype):
    """qkv and kv in one tensor: its gradient is that of its parts."""
    problem = Problem(rows=(24, 24), keys=(24, 24), heads=(4, 4), options={"causal": True})
    q, k, v = packed(problem, dtype)
    _, _, want = by_call(problem, {"q": q, "k": k, "v": v}, False, False)
    qkv, kv, own = torch.stack([q, k, v], 2).requires_grad_(), torch.stack([k, v], 2).requires_grad_(), q.clone()
    weighted(flashspark.flash_attn_qkvpacked_func(qkv, causal=True), None).backward()
    for part, name in enumerate("qkv"):
        assert torch.equal(qkv.grad[:, :, part], want[name])
    weighted(flashspark.flash_attn_kvpacked_func(own.requires_grad_(), kv, causal=True), None).backward()
    assert torch.equal(own.grad, want["q"]) and torch.equal(kv.grad[:, :, 1], want["v"])
    grouped = torch.cat([q, k[:, :, :2], v[:, :, :2]], 2).requires_grad_()
    weighted(flashspark.flash_attn_qkvpacked_func(grouped, causal=True, num_heads_q=4), None).backward()
    _, _, want = by_call(problem, {"q": q, "k": k[:, :, :2], "v": v[:, :, :2]}, False, False)
    assert torch.equal(grouped.grad, torch.cat([want["q"], want["k"], want["v"]], 2))
    flat, cu = qkv.detach().flatten(0, 1).requires_grad_(), torch.tensor([0, 24, 48], dtype=torch.int32)
    weighted(flashspark.flash_attn_varlen_qkvpacked_func(flat, cu, 24, causal=True).view(2, 24, 4, 32), None).backward()
    assert torch.equal(flat.grad.view(qkv.shape), qkv.grad)
    flat_q, flat_kv = own.detach().flatten(0, 1).requires_grad_(), kv.detach().flatten(0, 1).requires_grad_()
    out = flashspark.flash_attn_varlen_kvpacked_func(flat_q, flat_kv, cu, cu, 24, 24, causal=True)
    weighted(out.view(2, 24, 4, 32), None).backward()
    assert torch.equal(flat_q.grad.view(own.shape), own.grad) and torch.equal(flat_kv.grad.view(kv.shape), kv.grad)


def test_views_and_expanded_arguments():
    """Transposed q, keys and slopes of one sequence for all, a bias of one head for all: autograd sums what was
    expanded."""
    generator = torch.Generator().manual_seed(1)
    made = {
        "q": torch.randn(2, 4, 20, 32, generator=generator), "k": torch.randn(1, 30, 2, 32, generator=generator),
        "v": torch.randn(1, 30, 2, 32, generator=generator), "slope": torch.rand(1, 4, generator=generator),
        "bias": torch.randn(2, 20, 1, 7, generator=generator),
    }  # fmt: skip

    def call(x, function):
        return function(
            x["q"].transpose(1, 2), x["k"].expand(2, -1, -1, -1), x["v"].expand(2, -1, -1, -1),
            alibi_slopes=x["slope"].expand(2, 4), rel_logits=x["bias"].expand(-1, -1, 4, -1),
        )  # fmt: skip

    def reference(q, k, v, alibi_slopes, rel_logits):
        each = [Options(alibi_slopes=alibi_slopes[b], rel_logits=rel_logits[b]) for b in range(2)]
        return torch.stack([attend(q[b], k[b], v[b], each[b])[0] for b in range(2)])

    grads = []
    for dtype, function in ((torch.float32, flashspark.flash_attn_func), (torch.float64, reference)):
        x = {name: value.detach().to(dtype).requires_grad_() for name, value in made.items()}
        weighted(call(x, function), None).backward()
        grads.append({name: value.grad.double() for name, value in x.items()})
    for name, got in grads[0].items():
        torch.testing.assert_close(got, grads[1][name], rtol=1e-4, atol=1e-4)


def test_strange_gradients_of_the_result():
    """dout may be expanded (of a sum), transposed, a slice, or lazily negated."""
    given = leaves(DENSE["causal"], torch.float32, False)

    def grad(loss):
        x = {name: value.clone().requires_grad_() for name, value in given.items()}
        loss(flashspark.flash_attn_func(**x, causal=True)).backward()
        return [value.grad for value in x.values()]

    weights = random(2, 29, 4, 32)
    for strange, plain in (
        (lambda out: out.sum(), lambda out: (out * torch.ones_like(out)).sum()),
        (lambda out: (out.transpose(1, 2) * weights.transpose(1, 2)).sum(), lambda out: (out * weights).sum()),
        (lambda out: (out[..., 3:9] * weights[..., 3:9]).sum(), None),
        (lambda out: torch.view_as_complex(out.reshape(2, 29, 4, 16, 2)).conj().imag.sum(), None),
    ):
        got = grad(strange)
        if plain is not None:
            assert all(torch.equal(a, b) for a, b in zip(got, grad(plain)))
        assert all(x.isfinite().all() and x.abs().max() > 0 for x in got)


def test_deterministic_calls_repeat():
    given = leaves(DENSE["everything"], torch.bfloat16, False)
    first = by_call(DENSE["everything"], given, False, True, deterministic=True)
    for threads in (1, 2, 0):
        again = by_call(DENSE["everything"], given, False, True, deterministic=True, num_threads=threads)
        assert all(torch.equal(a, b) for a, b in zip(first[2].values(), again[2].values()))


def test_finite_differences():
    """Of the call itself, in float32, along random directions; of two steps, so that third derivatives cancel."""
    problem = Problem(given={**sinks(), **slopes(4)}, options={"softcap": 4.0, "window_size": (12, 4)})
    given = leaves(problem, torch.float32, False)
    _, _, got = by_call(problem, given, False, True)

    def loss(step, directions):
        moved = {name: x + step * directions[name] for name, x in given.items()}
        out, lse = flashspark.flash_attn_func(**moved, **problem.options, return_softmax_lse=True)
        return weighted(out, lse).item()

    generator = torch.Generator().manual_seed(6)
    for name in given:
        direction = {n: torch.zeros_like(x) for n, x in given.items()}
        direction[name] = torch.randn(given[name].shape, generator=generator)
        whole, half = ((loss(h, direction) - loss(-h, direction)) / (2 * h) for h in (1e-2, 5e-3))
        difference = (4 * half - whole) / 3
        slope = (got[name].double() * direction[name].double()).sum().item()
        assert abs(difference - slope) <= 2e-3 * max(abs(slope), 1.0) + 1e-2, name


def test_what_the_reference_itself_is():
    """The reference in float64 passes torch's own check by finite differences."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in
               ((5, 2, 4), (6, 1, 4), (6, 1, 3)))  # fmt: skip
    option = Options(causal=True, softcap=3.0, sinks=torch.zeros(2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: attend(*x, option), (q, k, v))


def test_lengths_given_as_numpy(rng):
    given = leaves(VARLEN["documents"], torch.float32, True)
    cu = offsets(VARLEN["documents"].rows)
    grads = []
    for lengths in (torch.from_numpy(cu), np.asarray(cu)):
        x = {name: value.clone().requires_grad_() for name, value in given.items()}
        weighted(flashspark.flash_attn_varlen_func(**x, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=40,
                                                   max_seqlen_k=40, causal=True), None).backward()  # fmt: skip
        grads.append([value.grad for value in x.values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
