"""Gradients of calls that have built-in biases or masks beside score functions, mask functions or block lists.

Through the doors that models use: flash_attn_func and flash_attn_varlen_func of tensors that require gradients. The
bounds are those of test_backward.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import flashspark
import pytest
import torch
from flashspark._block_mask import to_block_sparse_tensors
from test_backward import Case, by_formula, compare, lengths, make, unused_biases

BLOCK = 64
EXTENT, KEYS = 48, 400  # of what score functions capture


def table(score, b, h, q, k, lengths, aux):
    distance = q + lengths.seqlen_k - lengths.seqlen_q - k
    return score + aux[0][h, torch.clamp(distance, 0, EXTENT - 1)]


def temperature(score, b, h, q, k, lengths, aux):
    return score * torch.sigmoid(aux[0][h, 0]) + aux[1][k]


def speckled(b, h, q, k, lengths, aux):
    """Of some blocks all, of some none."""
    return ((q + k) % 3 != 0) | ((k >= 64) & (k < 128)) & (q > 5)


FUNCTIONS: dict[str, dict[str, Any]] = {
    "table": {"score": table},
    "temperature": {"score": temperature},
    "mask": {"mask": speckled},
    "both": {"score": temperature, "mask": speckled},
    "lists": {"mask": speckled},
    "lists and score": {"score": table, "mask": speckled},
}
# What stands beside them.
BUILT_IN: dict[str, dict[str, Any]] = {
    "alibi": {"alibi": "heads", "options": {"causal": True}},
    "alibi by sequence": {"alibi": "sequences"},
    "rel": {"rel": 100, "options": {"causal": True}},
    "prefix": {"prefix": "per_seq", "options": {"causal": True}},
    "prefix by token": {
        "prefix": "per_token",
        "options": {"causal": True, "window_size": (50, 0), "prefix_clamp_window": True},
    },
    "rswa": {"rswa": 40},
    "chunks": {"options": {"causal": True, "attention_chunk": 70}},
    "everything": {
        "alibi": "heads", "rel": 60, "prefix": "per_seq", "sinks": True, "dlse": True, "p": 0.1,
        "options": {"causal": True, "softcap": 10.0, "attention_chunk": 90},
    },
}  # fmt: skip


def with_captures(case: Case, seed: int, device: torch.device):
    t = make(case, seed, device)
    generator = torch.Generator().manual_seed(seed)
    if case.score is not None:
        t.aux0 = torch.randn(case.heads[0], EXTENT, generator=generator).to(device)
    if case.score is temperature:
        t.aux1 = torch.randn(KEYS, generator=generator).to(device)
    return t


def by_autograd(case: Case, given, lists: bool, wanted: list[str]):
    """out, and the gradients of the wanted."""
    t = replace(given)
    for name in wanted:
        setattr(t, name, getattr(t, name).detach().clone().requires_grad_())
    batch = len(case.lengths)
    options = {**case.options, "rswa_window": case.rswa, "alibi_slopes": t.alibi_slopes}
    options |= {"prefix_ranges": t.prefix_ranges, "rswa_prefix_lens": t.rswa_prefix_lens, "learnable_sink": t.sinks}
    options |= {"score_mod": case.score, "mask_mod": case.mask, "return_softmax_lse": True}
    if case.p:
        options |= {"dropout_p": case.p, "rng_state": (2**40 + 77, 5)}
    if case.score is not None:
        options["aux_tensors"] = [x for x in (t.aux0, t.aux1) if x is not None]
    if case.varlen:
        cu = [
            torch.tensor([0, *torch.tensor([n[x] for n in case.lengths]).cumsum(0)], dtype=torch.int32).to(t.q.device)
            for x in (0, 1)
        ]
        longest = [max(n[x] for n in case.lengths) for x in (0, 1)]
        out, lse = flashspark.flash_attn_varlen_func(t.q, t.k, t.v, *cu, *longest, rel_logits=t.rel_logits, **options)
        dlse = None if t.dlse is None else t.dlse.t()
    else:
        q, k, v = (x.view(batch, -1, *x.shape[1:]) for x in (t.q, t.k, t.v))
        if case.rel:
            options["rel_logits"] = t.rel_logits.view(batch, -1, *t.rel_logits.shape[1:])
        if lists:
            mask = flashspark.create_block_mask(
                lambda b, h, i, j: speckled(b, h, i, j, None, None), batch, None, q.shape[1], k.shape[1],
                device=q.device, BLOCK_SIZE=BLOCK,
            )  # fmt: skip
            options["block_sparse_tensors"] = to_block_sparse_tensors(mask)
        out, lse = flashspark.flash_attn_func(q, k, v, **options)
        dlse = None if t.dlse is None else t.dlse.view(batch, -1, lse.shape[1]).transpose(1, 2)
        out = out.flatten(0, 1)
    results, gradients = (out,), (given.dout,)
    if dlse is not None:
        results, gradients = (out, lse), (given.dout, dlse)
    return out.detach(), torch.autograd.grad(results, [getattr(t, name) for name in wanted], gradients)


def check(case: Case, seed: int, device: torch.device, lists: bool = False):
    tensors = with_captures(case, seed, device)
    names = tensors.wanted()
    out, got = by_autograd(case, tensors, lists, names)
    exact = by_formula(case, torch.float64, tensors)
    want = by_formula(case, torch.float64, tensors, out)
    peer = by_formula(case, case.dtype, tensors)
    compare(case, names, got, want, exact, peer, seed, unused_biases(case, tensors) if case.rel else None)


WIDTHS = ((64, 64), (128, 128), (256, 256), (192, 128), (80, 80))
TYPES = (torch.bfloat16, torch.float16)
CASES = list(itertools.product(FUNCTIONS, BUILT_IN))


@pytest.mark.parametrize(("functions", "built_in"), CASES)
def test_beside_functions(functions, built_in, device):
    number = CASES.index((functions, built_in))
    width = WIDTHS[number % len(WIDTHS)]
    case = Case(
        lengths((200, 300), (200, 300)), (4, 2), width, dtype=TYPES[number % 2], **BUILT_IN[built_in],
        **FUNCTIONS[functions],
    )  # fmt: skip
    check(case, number, device, "lists" in functions)


@pytest.mark.parametrize("built_in", BUILT_IN)
@pytest.mark.parametrize("width", WIDTHS[:3])
def test_packed_sequences(width, built_in, device):
    functions = FUNCTIONS[("table", "both")[list(BUILT_IN).index(built_in) % 2]]
    case = Case(
        lengths((1, 1), (77, 130), (300, 300), (5, 260)), (6, 3), width, varlen=True, **BUILT_IN[built_in], **functions
    )
    check(case, width[0], device)


DETERMINISTIC = {
    "alibi, d64": {"alibi": "heads", "width": (64, 64), "options": {"causal": True}},
    "alibi by sequence": {"alibi": "sequences"},
    "rel, d256": {"rel": 70, "width": (256, 256), "options": {"causal": True}},
    "rswa": {"rswa": 70},
    "prefix": {"prefix": "per_seq", "options": {"causal": True}},
    "chunks, dropout": {"p": 0.1, "options": {"causal": True, "attention_chunk": 90}},
}


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_gradients_have_the_same_bits(name, lists, device):
    changes = {key: dict(x) if key == "options" else x for key, x in DETERMINISTIC[name].items()}
    changes["options"] = {**changes.get("options", {}), "deterministic": True}
    score = None if lists else temperature
    case = Case(lengths((600, 700), (600, 700)), (4, 2), mask=speckled, score=score, **changes)
    tensors = with_captures(case, 5, device)
    if score is not None:
        tensors.aux1 = torch.randn(700, device=device)
    names = tensors.wanted()
    _, first = by_autograd(case, tensors, lists, names)
    for _ in range(2 if device.type == "cpu" else 20):
        assert all(map(torch.equal, by_autograd(case, tensors, lists, names)[1], first))


@pytest.mark.needs_gpu
@pytest.mark.parametrize("built_in", ["alibi", "rel", "rswa"])
def test_a_captured_call_replays(built_in, device):
    """A kernel that is compiled at run time, beside biases, in a CUDA graph."""
    case = Case(lengths((200, 300)), (4, 2), score=table, **BUILT_IN[built_in])
    tensors = with_captures(case, 3, device)
    names = tensors.wanted()
    _, want = by_autograd(case, tensors, False, names)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        by_autograd(case, tensors, False, names)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        _, got = by_autograd(case, tensors, False, names)
    graph.replay()
    torch.cuda.synchronize()
    for name, x, y in zip(names, got, want):
        assert (x.float() - y.float()).abs().max() <= 0.01 * y.float().abs().max(), name
