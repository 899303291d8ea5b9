"""Dropout on NumPy arrays: what is dropped is docs/design/dropout.md's, key for key, and the results are those of the
probabilities that are left."""

from __future__ import annotations

import flashspark
import ml_dtypes
import numpy as np
import pytest
from dropout_reference import dropped, dropped_dense, dropped_draws, philox
from flashspark import flash_attn_func, flash_attn_varlen_func
from flashspark._call import CACHE, attend
from flashspark._signature import NO_TAIL, in_tail
from problems import offsets, pages
from reference import Options, attend_dense, attend_one, attend_varlen, close, wide

STATE = (0x123456789ABCDEF0 % 2**62, 77)
LENGTHS_Q, LENGTHS_K = [5, 0, 37, 1, 20], [40, 3, 65, 0, 33]


def dense(normal, dtype=np.float32, b=2, tq=21, tk=75, heads=(4, 2), d=32, dv=None):
    shapes = (b, tq, heads[0], d), (b, tk, heads[1], d), (b, tk, heads[1], dv or d)
    return tuple(normal(*shape, dtype=dtype) for shape in shapes)


def packed(normal, dtype=np.float32, heads=(4, 2), d=32):
    """q, the keys and values of each sequence, and the lengths as flash_attn_varlen_func has them."""
    q = normal(sum(LENGTHS_Q), heads[0], d, dtype=dtype)
    ks, vs = ([normal(n, heads[1], d, dtype=dtype) for n in LENGTHS_K] for _ in range(2))
    lengths = dict(cu_seqlens_q=offsets(LENGTHS_Q), max_seqlen_q=max(LENGTHS_Q), max_seqlen_k=max(LENGTHS_K))
    return q, ks, vs, lengths


def options_of(p, sequences, heads, **more):
    """The reference's options of sequences of (queries, keys)."""
    return [
        Options(dropout_p=p, dropped=dropped(STATE, p, b, heads, rows, keys), **more)
        for b, (rows, keys) in enumerate(sequences)
    ]


def test_the_generator_gives_the_published_numbers():
    for counter, key, words in (
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        assert [f"{int(word):08x}" for word in philox(key, counter)] == words.split()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("b", "tq", "tk", "heads", "d", "dv"),
    [
        (1, 1, 1, (1, 1), 8, 8),
        (2, 3, 33, (4, 2), 32, 16),
        (1, 64, 64, (2, 2), 64, 64),
        (3, 17, 130, (6, 1), 24, 40),
        (1, 1, 700, (8, 2), 64, 64),
        (1, 130, 31, (1, 1), 16, 128),
        (2, 100, 257, (2, 1), 20, 20),
        (1, 2, 0, (2, 1), 8, 8),
    ],
)
def test_masks(normal, b, tq, tk, heads, d, dv, p):
    q, k, v = dense(normal, b=b, tq=tq, tk=tk, heads=heads, d=d, dv=dv)
    _, _, probabilities = flash_attn_func(q, k, v, dropout_p=p, rng_state=STATE, return_attn_probs=True)
    assert probabilities.shape == (b, heads[0], tq, tk) and probabilities.dtype == np.float32
    np.testing.assert_array_equal(probabilities < 0, dropped_dense(STATE, p, b, heads[0], tq, tk))


@pytest.mark.parametrize("implementation", ["cpu-engine", "cpu-reference"])
@pytest.mark.parametrize(
    "given",
    [
        *[{}, {"causal": True}, {"window_size": (7, 3)}, {"softcap": 5.0, "causal": True}, {"softmax_scale": 0.05}],
        *[{"num_splits": 3}, {"deterministic": True}, {"num_threads": 1, "causal": True}],
    ],
    ids=str,
)
def test_results(normal, dtype, given, implementation):
    q, k, v = dense(normal, dtype)
    given = {"dropout_p": 0.25, "rng_state": STATE, "implementation": implementation, **given}
    out, lse = flash_attn_func(q, k, v, **given, return_softmax_lse=True)
    own = {n: given[n] for n in ("causal", "softcap", "softmax_scale") if n in given}
    left, right = given.get("window_size", (-1, -1))
    want, want_lse = attend_dense(q, k, v, options_of(0.25, [(21, 75)] * 2, 4, left=left, right=right, **own))
    assert out.dtype == dtype and lse.dtype == np.float32
    close(out, want)
    close(lse, want_lse, dtype="float16", what="lse")


def test_biases(normal, rng):
    q, k, v = dense(normal)
    slopes, sinks, bias = rng.random(4).astype(np.float32), normal(4), normal(2, 21, 4, 30)
    given = dict(alibi_slopes=slopes, sinks=sinks, rel_logits=bias, causal=True)
    out, lse, p = flash_attn_func(q, k, v, 0.25, **given, rng_state=STATE, return_attn_probs=True)
    options = options_of(0.25, [(21, 75)] * 2, 4, causal=True, alibi_slopes=slopes, sinks=sinks)
    for b, option in enumerate(options):
        option.rel_logits = bias[b]
    want, want_lse = attend_dense(q, k, v, options)
    close(out, want)
    close(lse, want_lse, what="lse")
    left = 1 - np.exp(sinks[None, :, None] - lse)  # the sinks take the rest
    np.testing.assert_allclose(np.abs(p).sum(-1), left, atol=1e-5)


def test_float8(normal):
    q, k, v = dense(normal, ml_dtypes.float8_e4m3fn)
    scales = {name: np.full((2, 2), 1.5, np.float32) for name in ("q_descale", "k_descale", "v_descale")}
    out, _, p = flash_attn_func(q, k, v, 0.5, **scales, rng_state=STATE, return_attn_probs=True)
    descales = dict(q_descale=1.5, k_descale=1.5, v_descale=1.5)
    close(out, attend_dense(q, k, v, options_of(0.5, [(21, 75)] * 2, 4, **descales))[0], dtype="float8_e4m3fn")
    assert p.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(p < 0, dropped_dense(STATE, 0.5, 2, 4, 21, 75))
    np.testing.assert_allclose(np.abs(wide(p)).sum(-1), 1, atol=1e-2)


@pytest.mark.parametrize("layout", ["packed", "paged", "dense keys"])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(normal, rng, dtype, layout, causal):
    q, ks, vs, lengths = packed(normal, dtype)
    k, v = (np.concatenate(x) for x in (ks, vs))
    where = {"cu_seqlens_k": offsets(LENGTHS_K)}
    if layout == "paged":
        k, v, table = pages(rng, ks, vs, 8)
        where = {"cu_seqlens_k": None, "seqused_k": np.array(LENGTHS_K, np.int32), "block_table": table}
    elif layout == "dense keys":
        k, v = (np.stack([np.pad(x, ((0, 65 - len(x)), (0, 0), (0, 0))) for x in xs]) for xs in (ks, vs))
        where = {"cu_seqlens_k": None, "seqused_k": np.array(LENGTHS_K, np.int32)}
    given = dict(**lengths, **where, dropout_p=0.5, rng_state=STATE, causal=causal, return_attn_probs=True)
    out, lse, p = flash_attn_varlen_func(q, k, v, **given)
    options = options_of(0.5, zip(LENGTHS_Q, LENGTHS_K), 4, causal=causal)
    want, want_lse = attend_varlen(q, ks, vs, lengths["cu_seqlens_q"], options)
    close(out, want)
    close(lse, want_lse, dtype="float16", what="lse")
    assert p.shape == (5, 4, 37, 65) and p.dtype == dtype
    for b, (rows, keys) in enumerate(zip(LENGTHS_Q, LENGTHS_K)):
        np.testing.assert_array_equal(p[b, :, :rows, :keys] < 0, options[b].dropped)
        assert not p[b, :, rows:].any() and not p[b, :, :, keys:].any()
    again = flash_attn_varlen_func(q, k, v, **{**given, "max_seqlen_q": None})[2]
    np.testing.assert_array_equal(again, p)


def test_rows_and_keys_that_are_not_in_use(normal):
    q, k, v = dense(normal)
    given = dict(seqused_q=np.array([21, 4], np.int32), seqused_k=np.array([0, 50], np.int32))
    *_, p = flash_attn_func(q, k, v, 0.5, **given, rng_state=STATE, return_attn_probs=True)
    want = dropped(STATE, 0.5, 1, 4, 4, 50)
    np.testing.assert_array_equal(p[1, :, :4, :50] < 0, want)
    assert not p[0].any() and not p[1, :, 4:].any() and not p[1, :, :, 50:].any()


def test_left_padding_counts(normal):
    """No function with dropout has it, but the native call does."""
    q, k, v = dense(normal)
    leftpad = np.array([3, 40], np.int32)
    tail = list(NO_TAIL)
    tail[in_tail("leftpad_k")], tail[in_tail("dropout_p")] = leftpad, 0.5
    tail[in_tail("rng_state")] = np.array(STATE, np.int64)
    head = (None, True, -1, -1, 0.0, 0, False, None, 0)
    out, _ = attend(CACHE, (q, k, v), None, None, False, None, head, tuple(tail))
    options = options_of(0.5, [(21, 75)] * 2, 4, causal=True)
    for option, pad in zip(options, leftpad):
        option.leftpad = int(pad)
    close(out, attend_dense(q, k, v, options)[0])


def masked(b, h, i, j, info, aux):
    return (i + 50 >= j) & (j % 7 != 3)


def scored(score, b, h, i, j, info, aux):
    return score + aux[0][j] * 0.5


@pytest.mark.parametrize("functions", ["score_mod", "mask_mod", "both"])
def test_functions(normal, functions):
    q, k, v = dense(normal)
    table = normal(75)
    given = {"aux_tensors": [table]}
    if functions != "mask_mod":
        given["score_mod"] = scored
    if functions != "score_mod":
        given["mask_mod"] = masked
    out, lse, p = flash_attn_func(q, k, v, 0.25, **given, rng_state=STATE, return_attn_probs=True)
    i, j = np.ogrid[:21, :75]
    s = np.einsum("bqhd,bkhd->bhqk", q, k.repeat(2, 2)).astype(np.float64) / np.sqrt(32)
    s = s + table * 0.5 if functions != "mask_mod" else s
    s = np.where(masked(0, 0, i, j, None, None), s, -np.inf) if functions != "score_mod" else s
    total = np.exp(s).sum(-1)
    want, drops = np.exp(s) / total[..., None], dropped_dense(STATE, 0.25, 2, 4, 21, 75)
    close(lse, np.log(total), what="lse")
    np.testing.assert_array_equal(p < 0, drops)
    np.testing.assert_allclose(np.abs(p), want, atol=2e-6)
    left = np.where(drops, 0, want / 0.75)
    close(out, np.einsum("bhqk,bkhd->bqhd", left, v.repeat(2, 2)))


def test_block_lists(normal):
    q, k, v = dense(normal, tq=60, tk=100)
    counts = np.array([2, 1, 1, 2], np.int32).reshape(1, 1, 4)
    indices = np.array([[0, 2, 9, 9], [1, 9, 9, 9], [3, 9, 9, 9], [1, 3, 9, 9]], np.int32)[None, None]
    lists = flashspark.BlockSparseTensors(mask_block_cnt=counts, mask_block_idx=indices, block_size=(16, 32))
    given = dict(mask_mod=lambda b, h, i, j, *_: i + j >= 0, block_sparse_tensors=lists)
    out, _, p = flash_attn_func(q, k, v, 0.5, **given, rng_state=STATE, return_attn_probs=True)
    keep = np.zeros((60, 100), bool)
    for block, (n, keys) in enumerate(zip(counts[0, 0], indices[0, 0])):
        for key in keys[:n]:
            keep[block * 16 : block * 16 + 16, key * 32 : key * 32 + 32] = True
    drops = dropped_dense(STATE, 0.5, 2, 4, 60, 100)
    np.testing.assert_array_equal(p < 0, drops)
    assert ((p > 0) == (keep & ~drops)).all()
    values = np.einsum("bhqk,bkhd->bqhd", np.where(p > 0, p, 0) * 2, v.repeat(2, 2))
    close(out, values)


def test_a_state_in_every_form(normal):
    q, k, v = dense(normal)
    results = [
        flash_attn_func(q, k, v, 0.5, rng_state=state)
        for state in (STATE, list(STATE), np.array(STATE), np.array(STATE, np.uint64), tuple(np.array(STATE)))
    ]
    assert all(np.array_equal(x, results[0]) for x in results)
    high = np.array([2**64 - 5, 2**63], np.uint64)
    same = [flash_attn_func(q, k, v, 0.5, rng_state=s) for s in (high, high.view(np.int64), (-5, -(2**63)))]
    assert all(np.array_equal(x, same[0]) for x in same)
    for other in ((STATE[0], 78), (STATE[0] + 2**32, 77), (STATE[0], 77 + 2**32), (STATE[0] + 1, 77)):
        assert not np.array_equal(flash_attn_func(q, k, v, 0.5, rng_state=other), results[0])


def test_drawn_states(normal):
    q, k, v = dense(normal)
    np.random.seed(5)
    first, second = (flash_attn_func(q, k, v, 0.5) for _ in range(2))
    assert not np.array_equal(first, second)
    np.random.seed(5)
    np.testing.assert_array_equal(flash_attn_func(q, k, v, 0.5), first)
    np.random.seed(5)
    state = np.random.randint(0, 2**63 - 1, 2, np.int64)
    np.testing.assert_array_equal(flash_attn_func(q, k, v, 0.5, rng_state=state), first)


@pytest.mark.parametrize("given", [{}, {"dropout_p": 0}, {"dropout_p": None}, {"dropout_p": 0.0, "rng_state": (1, 2)}])
def test_nothing_is_drawn_without_need(normal, given):
    q, k, v = dense(normal)
    before = np.random.get_state()[1:3]
    out = flash_attn_func(q, k, v, **given)
    text = flash_attn_func(q, k, v, **{"dropout_p": 0.5, **given}, explain=True)
    after = np.random.get_state()[1:3]
    assert np.array_equal(before[0], after[0]) and before[1] == after[1]
    np.testing.assert_array_equal(out, flash_attn_func(q, k, v))
    assert ("dropout" in text) == (not given)


def test_parts_and_implementations_drop_the_same(normal):
    q, k, v = dense(normal, tq=3, tk=900)
    want = flash_attn_func(q, k, v, 0.5, rng_state=STATE, implementation="cpu-reference")
    for given in ({}, {"num_splits": 7}, {"num_threads": 1}, {"deterministic": True}, {"causal": False}):
        close(flash_attn_func(q, k, v, 0.5, rng_state=STATE, **given), want)


def test_probabilities_of_dropout(normal):
    """p is a multiple of 2^-15; what is kept is divided by 1 - p as it was given."""
    q, k, v = dense(normal)
    plain = flash_attn_func(q, k, v)
    small = 2.0**-18
    np.testing.assert_allclose(flash_attn_func(q, k, v, small, rng_state=STATE), plain / (1 - small), atol=1e-6)
    assert dropped_draws(small) == 0 and dropped_draws(0.5) == 2**14 and dropped_draws(0.999999) == 32767
    q, k, v = dense(normal, tq=64, tk=512)
    for p in (0.03, 0.3, 0.97):
        s = flash_attn_func(q, k, v, p, rng_state=STATE, return_attn_probs=True)[2]
        assert abs((s < 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / s.size)
    nearly = flash_attn_func(q, k, v, 0.999999, rng_state=STATE, return_attn_probs=True)[2]
    np.testing.assert_array_equal(nearly < 0, dropped_dense(STATE, 0.999999, 2, 4, 64, 512))


def test_attn_probs(normal, dtype):
    q, k, v = dense(normal, dtype)
    assert flash_attn_func(q, k, v, return_attn_probs=True)[2] is None
    assert flash_attn_func(q, k, v, dropout_p=0.0, rng_state=(1, 2), return_attn_probs=True)[2] is None
    # Scores so far apart that most probabilities are 0 in every type.
    out, _, p = flash_attn_func(q, k, v, 0.5, 100.0, rng_state=STATE, return_attn_probs=True)
    drops = dropped_dense(STATE, 0.5, 2, 4, 21, 75)
    assert p.dtype == dtype and (wide(p) == 0).any()
    np.testing.assert_array_equal(p < 0, drops)
    want = flash_attn_func(q, k, v, softmax_scale=100.0, return_softmax_lse=True)
    assert np.abs(wide(p)).max() <= 1 + 1e-2
    np.testing.assert_allclose(np.abs(wide(p)).sum(-1), 1, atol=1e-2)
    left = np.where(drops, 0, wide(p) * 2)
    close(out, np.einsum("bhqk,bkhd->bqhd", left, wide(v).repeat(2, 2)), dtype="bfloat16")
    assert want[1].shape == (2, 4, 21)
    text = flash_attn_func(q, k, v, 0.5, return_attn_probs=True, explain=True)
    assert isinstance(text, str)


def test_out_and_lse_that_are_given(normal):
    q, k, v = dense(normal)
    out, lse = np.empty_like(q), np.empty((2, 4, 21), np.float32)
    results = flash_attn_func(q, k, v, 0.5, rng_state=STATE, out=out, lse=lse, return_attn_probs=True)
    assert results[0] is out and results[1] is lse
    np.testing.assert_array_equal(out, flash_attn_func(q, k, v, 0.5, rng_state=STATE))
    want = attend_one(q[1], k[1], v[1], options_of(0.5, [(21, 75)] * 2, 4)[1])
    close(out[1], want[0])


class Other:
    """An array of a library that flashspark does not know."""

    def __init__(self, x):
        self._x, self.shape, self.dtype = x, x.shape, x.dtype

    def __dlpack__(self, **given):
        return self._x.__dlpack__(**given)

    def __dlpack_device__(self):
        return self._x.__dlpack_device__()


def test_arrays_of_other_libraries(normal):
    arrays = dense(normal)
    out = np.empty_like(arrays[0])
    q, k, v = map(Other, arrays)
    with pytest.raises(ValueError, match="rng_state = None: must be given, two integers, for a q that is Other"):
        flash_attn_func(q, k, v, 0.5, out=out)
    flash_attn_func(q, k, v, 0.5, out=out, rng_state=STATE)
    np.testing.assert_array_equal(out, flash_attn_func(*arrays, 0.5, rng_state=STATE))
    lse = np.empty((2, 4, 21), np.float32)
    with pytest.raises(NotImplementedError, match="return_attn_probs = True: must be False with dropout_p"):
        flash_attn_func(q, k, v, 0.5, out=out, lse=lse, rng_state=STATE, return_attn_probs=True)
    with pytest.raises(TypeError, match="q = None"):
        flash_attn_func(None, k, v, 0.5)
