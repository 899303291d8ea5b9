"""The guarantees of flashspark.h on NaN and infinity behind masks, q and out in the same memory, and overlap."""

from __future__ import annotations

import flashspark
import pytest
import torch
from oracle import failures, poison_unseen
from problem import Spec, build

MIXED = {"q_lens": [1, 7, 0, 130, 33], "k_lens": [300, 65, 20, 130, 700]}
KINDS: dict[str, dict] = {
    "few": {**MIXED},
    "wide": {"q_lens": [300] * 24, "k_lens": [420] * 24, "heads": (8, 4), "dims": (128, 128)},
    "decode": {"q_lens": [1, 1, 1], "k_lens": [900, 30, 1500], "dims": (128, 128)},
    "decode, splits": {"q_lens": [1, 3], "k_lens": [900, 700], "num_splits": 4},
    "changed": {**MIXED, "softcap": 20.0, "alibi": 1},
    "chunks": {**MIXED, "chunk": 64},
    "window": {**MIXED, "window": (30, 0)},
    "varlen": {**MIXED, "layout": "varlen"},
    "dense": {**MIXED, "layout": "dense"},
    "fp8": {**MIXED, "fp8": "kv"},
}


def future_keys(problem, b: int) -> tuple[torch.Tensor, ...]:
    """The position of the last key of sequence b: with a causal mask, only its last query keeps it."""
    _, _, first, count, _ = problem.sequences()[:, b]
    at = int(first + count - 1)
    if "page_table" in problem.host:
        size = problem.spec.page_size
        return int(problem.host["page_table"][b, at // size]), at % size
    return (at,) if problem.k.ndim == 3 else (b, at)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("tensor", ["k", "v"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropped_keys(kind, tensor, value, device):
    """A key that a row's mask hides: in K it never affects the row; in V at most its own columns, never lse."""
    spec = Spec(**KINDS[kind])
    if spec.fp8 and value in (float("inf"), -float("inf")):
        return  # e4m3 has no infinity
    problem = build(spec, 5, device)
    poison_unseen(problem)
    want = problem.run()
    b = max(range(len(spec.q_lens)), key=lambda n: spec.q_lens[n])
    place, column = future_keys(problem, b), 9
    getattr(problem, tensor)[(*place, slice(None), column)] = value
    got = problem.run()
    row, count = problem.sequences()[:2, b]
    dense = problem.q.shape[1] if problem.q.ndim == 4 else 0
    last = (b * dense if dense else int(row)) + int(count) - 1
    keep = torch.ones(problem.q.shape[:-2].numel(), dtype=torch.bool, device=device)
    keep[last] = False
    rows = [x.reshape(-1, *x.shape[-2:])[keep].float() for x in (got[0], want[0])]
    if tensor == "v":
        others = [n for n in range(problem.v.shape[-1]) if n != column]
        rows = [x[..., others] for x in rows]
    torch.testing.assert_close(*rows, rtol=0, atol=0, equal_nan=True)
    lse = [x.T if x.ndim == 2 else x.transpose(1, 2).reshape(-1, x.shape[1]) for x in (got[1], want[1])]
    torch.testing.assert_close(lse[0][keep], lse[1][keep], rtol=0, atol=0, equal_nan=True)


ALIASED = {**KINDS, "D512": {"q_lens": [3, 200], "k_lens": [500, 900], "heads": (8, 1), "dims": (512, 512)}}


@pytest.mark.parametrize("kind", ALIASED)
def test_out_may_be_q(kind, device):
    """The same bits, whichever CTA reads a row of q and whichever writes it."""
    problem = build(Spec(**ALIASED[kind]), 6, device)
    poison_unseen(problem)
    want, lse = problem.run()
    again = problem.q.clone()
    problem.q = again
    # There, two CTAs read the same rows of q, and one may write out before the other has read them.
    if kind == "D512" and again.is_cuda:
        with pytest.raises(ValueError, match="shares memory with q"):
            problem.run(again, torch.empty_like(lse))
        return
    problem.run(again, torch.empty_like(lse))
    kept = ~want.isnan()
    torch.testing.assert_close(again[kept], want[kept], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["k", "v"])
def test_out_may_not_be_a_key_or_value(name, device):
    q = torch.randn(2, 40, 4, 64, device=device).bfloat16()
    tensors = {"q": q, "k": torch.randn_like(q), "v": torch.randn_like(q)}
    before = tensors[name].clone()
    with pytest.raises(ValueError, match="out"):
        flashspark.flash_attn_func(**tensors, out=tensors[name])
    assert torch.equal(tensors[name], before)


@pytest.mark.parametrize("q_type", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fp8", ["", "kv", "qkv"])
@pytest.mark.parametrize("shape", ["prefill", "decode", "splits"])
def test_e4m3_results(shape, fp8, q_type, device):
    """Prefill, decode and combined partials, with and without lse; rounding is to nearest, like torch's."""
    lengths = {"prefill": ([200, 65, 0, 300], [330, 65, 9, 300]), "decode": ([1] * 4, [900, 3, 2000, 60])}
    q_lens, k_lens = lengths.get(shape, ([2, 1], [1500, 700]))
    for lse in (True, False):
        splits = 5 if shape == "splits" else 0
        spec = Spec(q_lens, k_lens, (8, 2), (128, 128), q_type, fp8=fp8, lse=lse, num_splits=splits, e4m3_out=True)
        problem = build(spec, 8, device)
        poison_unseen(problem)
        assert not failures(problem, *problem.run())


@pytest.mark.parametrize("scale", [1e-4, 3e4])
def test_e4m3_results_saturate(scale, device):
    """Values beyond 448 become the largest number, never NaN; values below the smallest one become zero."""
    spec = Spec([40, 1], [90, 700], e4m3_out=True)
    problem = build(spec, 9, device)
    poison_unseen(problem)
    problem.options["output_scale"] = torch.full((1,), scale, device=device)
    out = problem.run()[0].float()
    exact = build(spec, 9, device)
    poison_unseen(exact)
    exact.spec = Spec([40, 1], [90, 700])
    del exact.options["output_scale"]
    plain = exact.run()[0].float() / scale
    assert not out.isnan().any()
    torch.testing.assert_close(out, plain.clamp(-448, 448), rtol=0.08, atol=0.02)
