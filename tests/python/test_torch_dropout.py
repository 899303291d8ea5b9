"""Dropout on torch tensors: torch's generator, torch.compile, and S_dmask as flash-attention's own tests read it.
Skipped without torch."""

from __future__ import annotations

import math

import flashspark
import numpy as np
import pytest
from dropout_reference import dropped_dense
from problems import offsets

torch = pytest.importorskip("torch")

STATE = (2**61 + 12345, 9)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(dtype=torch.float32, b=2, tq=40, tk=70, heads=(4, 2), d=32):
    make = torch.Generator().manual_seed(3)
    shapes = (b, tq, heads[0], d), (b, tk, heads[1], d), (b, tk, heads[1], d)
    return [torch.randn(shape, generator=make).to(dtype) for shape in shapes]


def operators():
    from flashspark import torch_ops

    return torch_ops


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def attention_ref(q, k, v, dropout_p, dropout_mask, causal):
    """flash-attention's attention_ref (tests/test_flash_attn.py), as far as it is needed here."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q / math.sqrt(q.shape[-1]), k)
    if causal:
        masked = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
        scores = scores.masked_fill(masked, float("-inf"))
    attention = torch.softmax(scores, dim=-1)
    dropout_scaling = 1.0 / (1 - dropout_p)
    attention_drop = attention.masked_fill(~dropout_mask, 0.0)
    return torch.einsum("bhts,bshd->bthd", attention_drop, v * dropout_scaling), attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_as_flash_attentions_test_reads_it(dtype, causal):
    q, k, v = tensors(dtype)
    out, lse, S_dmask = flashspark.flash_attn_func(q, k, v, 0.17, causal=causal, return_attn_probs=True)
    dropout_mask = S_dmask >= 0
    assert S_dmask.shape == (2, 4, 40, 70) and S_dmask.dtype == dtype and S_dmask.device == q.device
    want, attention = attention_ref(q, k, v, 0.17, dropout_mask, causal)
    assert (out - want).abs().max() < TOLERANCE[dtype]
    assert (S_dmask.abs() - attention).abs().max() < TOLERANCE[dtype]
    assert abs((~dropout_mask).float().mean() - 0.17) < 0.02
    assert lse.dtype == torch.float32


def test_varlen_as_flash_attentions_test_reads_it():
    q, k, v = tensors(torch.float16)
    rows, keys = (40, 17), (12, 70)
    packed = [torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for x, lengths in ((q, rows), (k, keys), (v, keys))]
    given = [torch.from_numpy(offsets(lengths)) for lengths in (rows, keys)]
    call = dict(dropout_p=0.3, rng_state=STATE, return_attn_probs=True)
    out, _, S_dmask = flashspark.flash_attn_varlen_func(*packed, *given, 40, 70, **call)
    want = torch.from_numpy(dropped_dense(STATE, 0.3, 2, 4, 40, 70))
    for b, (i, j) in enumerate(zip(rows, keys)):
        assert torch.equal(S_dmask[b, :, :i, :j] < 0, want[b, :, :i, :j])
        assert not S_dmask[b, :, i:].any() and not S_dmask[b, :, :, j:].any()
        one = [x[b : b + 1, :n] for x, n in ((q, i), (k, j), (v, j))]
        expected, _ = attention_ref(*one, 0.3, ~want[b : b + 1, :, :i, :j], False)
        start = sum(rows[:b])
        assert (out[start : start + i] - expected[0]).abs().max() < 8e-3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_the_same_as_numpy(dtype):
    q, k, v = tensors(dtype)
    _, _, S_dmask = flashspark.flash_attn_func(q, k, v, 0.4, rng_state=STATE, return_attn_probs=True)
    assert np.array_equal((S_dmask < 0).numpy(), dropped_dense(STATE, 0.4, 2, 4, 40, 70))


def test_paged():
    q, k, v = tensors(torch.bfloat16)
    pages = [x.reshape(2 * 7, 10, 2, 32) for x in (k, v)]
    table = torch.arange(14, dtype=torch.int32).reshape(2, 7)
    table[0, 6] = 10**6
    lengths = torch.tensor([60, 70], dtype=torch.int32)
    call = dict(seqused_k=lengths, block_table=table, dropout_p=0.4, rng_state=STATE, return_attn_probs=True)
    starts = torch.tensor([0, 40, 80], dtype=torch.int32)
    _, _, S_dmask = flashspark.flash_attn_varlen_func(q.flatten(0, 1), *pages, starts, None, 40, 70, **call)
    want = dropped_dense(STATE, 0.4, 2, 4, 40, 70)
    want[0, :, :, 60:] = False
    assert np.array_equal((S_dmask < 0).numpy(), want)


def test_manual_seed():
    q, k, v = tensors()
    torch.manual_seed(11)
    first, second = (flashspark.flash_attn_func(q, k, v, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    assert torch.equal(flashspark.flash_attn_func(q, k, v, 0.5), first)
    torch.manual_seed(11)
    state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64)
    assert torch.equal(flashspark.flash_attn_func(q, k, v, 0.5, rng_state=state), first)
    before = torch.get_rng_state()
    flashspark.flash_attn_func(q, k, v, 0.5, rng_state=state)
    flashspark.flash_attn_func(q, k, v, 0.0)
    flashspark.flash_attn_func(q, k, v, 0.5, explain=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_forms_of_a_state():
    q, k, v = tensors()
    as_torch = torch.tensor(STATE)
    states = (STATE, as_torch, as_torch.view(torch.uint64), np.array(STATE))
    results = [flashspark.flash_attn_func(q, k, v, 0.5, rng_state=state) for state in states]
    assert all(torch.equal(x, results[0]) for x in results)
    assert as_torch.tolist() == list(STATE)


@pytest.mark.parametrize(
    ("state", "error", "text"),
    [
        (torch.zeros(2, dtype=torch.int32), TypeError, r"rng_state\.dtype = int32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"rng_state\.shape\[0\] = 3"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), NotImplementedError, r"rng_state\.device = meta"),
        (torch.Generator(), TypeError, r"rng_state = Generator"),
    ],
)
def test_errors(state, error, text):
    q, k, v = tensors()
    with pytest.raises(error, match=text):
        flashspark.flash_attn_func(q, k, v, 0.5, rng_state=state)


@pytest.mark.parametrize("door", ["package", "operator"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_backward_pass_drops_the_same(name, door):
    """Without a softmax that hides it: the gradient of v is the sum of what is left of the probabilities."""
    given = dict(zip("qkv", tensors()))
    given[name].requires_grad_()
    home = flashspark if door == "package" else operators()
    out = home.flash_attn_func(**given, dropout_p=0.5, rng_state=STATE)
    out.sum().backward()
    wide = {n: x.detach().double().requires_grad_(n == name) for n, x in given.items()}
    kept = torch.from_numpy(~dropped_dense(STATE, 0.5, 2, 4, 40, 70))
    attention_ref(*wide.values(), 0.5, kept, False)[0].sum().backward()
    torch.testing.assert_close(given[name].grad.double(), wide[name].grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not home.flash_attn_func(**given, dropout_p=0.5).requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    """One graph, in which every call draws again."""
    q, k, v = tensors()

    def layer(q, k, v):
        return operators().flash_attn_func(q, k, v, dropout_p=0.5, causal=True) * 2

    run = compiled(layer, backend)
    run(q, k, v)
    torch.manual_seed(4)
    first, second = run(q, k, v), run(q, k, v)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(run(q, k, v), first)
    zeros = (first == 0).float().mean()
    assert zeros < 0.2  # of the first rows, whose few keys are all dropped
    if backend == "aot_eager":
        torch.manual_seed(4)
        assert torch.equal(layer(q, k, v), first)


def test_compiled_with_a_state():
    q, k, v = tensors()
    state = torch.tensor(STATE)

    def layer(q, k, v, state):
        return operators().flash_attn_func(q, k, v, dropout_p=0.5, rng_state=state)

    def fixed(q, k, v):
        return operators().flash_attn_func(q, k, v, dropout_p=0.5, rng_state=STATE)

    want = flashspark.flash_attn_func(q, k, v, 0.5, rng_state=STATE)
    run = compiled(layer)
    assert torch.equal(run(q, k, v, state), want)
    assert not torch.equal(run(q, k, v, state + 1), want)
    assert torch.equal(compiled(fixed)(q, k, v), want)


def test_compiled_probabilities():
    q, k, v = tensors(torch.bfloat16)

    def probabilities(q, k, v, state):
        return operators().flash_attn_func(q, k, v, 0.5, rng_state=state, return_attn_probs=True)[2]

    want = flashspark.flash_attn_func(q, k, v, 0.5, rng_state=STATE, return_attn_probs=True)[2]
    assert torch.equal(probabilities(q, k, v, torch.tensor(STATE)), want)
    assert torch.equal(compiled(probabilities)(q, k, v, torch.tensor(STATE)), want)


def test_operator_without_memory():
    q, k, v = (x.to("meta") for x in tensors())
    out = operators().flash_attn_func(q, k, v, dropout_p=0.5)
    assert out.shape == q.shape and out.device.type == "meta"
    with pytest.raises(TypeError, match="rng_state = ndarray: must be a torch tensor"):
        operators().flash_attn_func(*tensors(), dropout_p=0.5, rng_state=np.array(STATE))


def test_opcheck():
    q, k, v = tensors(b=1, tq=4, tk=6)
    torch_ops = operators()
    tail = list(torch_ops.NO_TAIL)
    tail[torch_ops._DROPOUT :] = 0.5, torch.tensor(STATE)
    head = (None, True, -1, -1, 0.0, 0, False, None, 0)
    torch.library.opcheck(torch.ops.flashspark.attention.default, (q, k, v, *head, *tail, True))
