"""Functions in FlashAttention-4's form, in the functions that have its names: dense, packed and paged, against
float64."""

from __future__ import annotations

from types import SimpleNamespace

import flashspark
import ml_dtypes
import numpy as np
import pytest
from flashspark import _flash_attn_fwd, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flex_reference import check, kept_by_lists, lists_of
from problems import offsets, pages

HEADS, D = 4, 32
LENGTHS = [(1, 41), (17, 17), (30, 90)]
RNG = np.random.default_rng(11)
SLOPES = RNG.random(HEADS).astype(np.float32)
TOKENS = RNG.standard_normal(256).astype(np.float32)
DOCS = np.sort(RNG.integers(0, 4, 256)).astype(np.int32)


def alibi(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    """Counts from the last query and key."""
    last = q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q
    return score + aux_tensors[0][h_idx] * (kv_idx - last) / 8


def by_row(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    """Reads arrays whose rows are those of the packed tensors."""
    return score + aux_tensors[1][kv_idx + seqlen_info.offset_k] - aux_tensors[1][q_idx + seqlen_info.offset_q]


def numbers(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars):
    return np.tanh(score * aux_scalars[0]) * 2 + aux_scalars[1] * (b_idx - h_idx) * (kv_idx % 3) * 0.1


def documents(b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    first = aux_tensors[2][q_idx + seqlen_info.offset_q]
    return (first == aux_tensors[2][kv_idx + seqlen_info.offset_k]) | (kv_idx < 5 + h_idx)


def causal_with_prefix(b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (kv_idx <= q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q) | (kv_idx < 4 * b_idx)


AUX = [SLOPES, TOKENS, DOCS]
NUMBERS = (0.75, 2)
SCORES = {"none": None, "alibi": alibi, "by row": by_row, "numbers": numbers}
MASKS = {"none": None, "documents": documents, "prefix": causal_with_prefix}
# What comes before the user's functions: (arguments, what they make of scores, which keys they keep).
OTHERS = {
    "nothing": ({}, None, None),
    "causal": ({"causal": True}, None, lambda i, j, pos: j <= pos),
    "window": ({"window_size": (9, 3)}, None, lambda i, j, pos: (pos - j <= 9) & (j - pos <= 3)),
    "softcap": ({"softcap": 1.5}, lambda s, h, distance: 1.5 * np.tanh(s / 1.5), None),
    "sinks": ({"sinks": RNG.standard_normal(HEADS).astype(np.float32)}, None, None),
    "alibi": ({"alibi_slopes": SLOPES}, lambda s, h, distance: s - SLOPES[h] * np.abs(distance), None),
}


def expected(b, info, score_mod, mask_mod, others):
    """(score function, kept keys, sinks) of one sequence, for the oracle."""
    arguments, before, keeps = others
    rest = (info, AUX, NUMBERS)

    def score(s, _, h, q, k):
        if before is not None:
            s = before(s, h, q + info.seqlen_k - info.seqlen_q - k)
        if score_mod is None:
            return s
        return score_mod(s, np.int32(b), h, q, k, *(rest if score_mod is numbers else rest[:2]))

    shape = (1, HEADS, info.seqlen_q, info.seqlen_k)
    at = np.ix_(*(np.arange(n, dtype=np.int32) for n in shape))
    keep = np.ones(shape, bool)
    if mask_mod is not None:
        keep &= mask_mod(np.int32(b), at[1], at[2], at[3], *rest[:2])
    if keeps is not None:
        keep &= keeps(at[2], at[3], at[2] + info.seqlen_k - info.seqlen_q)
    return score, keep, arguments.get("sinks")


def lengths_of(b, packed_q=True, packed_k=True):
    (rows, keys), before = LENGTHS[b], LENGTHS[:b]
    return SimpleNamespace(
        seqlen_q=rows, seqlen_k=keys, offset_q=sum(x for x, _ in before) * packed_q,
        offset_k=sum(x for _, x in before) * packed_k,
    )  # fmt: skip


def check_sequences(out, lse, q, ks, vs, score_mod, mask_mod, others=OTHERS["nothing"], packed_k=True):
    for b in range(len(LENGTHS)):
        info = lengths_of(b, packed_k=packed_k)
        rows = slice(info.offset_q, info.offset_q + info.seqlen_q)
        score, keep, sinks = expected(b, info, score_mod, mask_mod, others)
        tensors = (x.transpose(1, 0, 2)[None] for x in (q[rows], ks[b], vs[b]))
        check(out[rows].transpose(1, 0, 2)[None], *tensors, score, keep, lse=lse[None, :, rows], sinks=sinks)


@pytest.fixture
def sequences(normal):
    """q, and k and v of each sequence."""

    def make(dtype=np.float32, kv_heads=2):
        q = normal(sum(n for n, _ in LENGTHS), HEADS, D, dtype=dtype)
        return q, *([normal(n, kv_heads, D, dtype=dtype) for _, n in LENGTHS] for _ in range(2))

    return make


CU_Q, CU_K = (offsets([x[i] for x in LENGTHS]) for i in range(2))
USED = np.array([n for _, n in LENGTHS], np.int32)


def functions(score_mod, mask_mod):
    scalars = {"aux_scalars": NUMBERS} if score_mod is numbers else {}
    aux = {"aux_tensors": AUX} if score_mod is not None or mask_mod is not None else {}
    return {"score_mod": score_mod, "mask_mod": mask_mod, **aux, **scalars}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_packed(sequences, score, mask):
    for dtype in (np.float32, ml_dtypes.bfloat16):
        q, ks, vs = sequences(dtype)
        out, lse = flash_attn_varlen_func(
            q, np.concatenate(ks), np.concatenate(vs), CU_Q, CU_K, 30, 90, return_softmax_lse=True,
            **functions(SCORES[score], MASKS[mask]),
        )  # fmt: skip
        check_sequences(out, lse, q, ks, vs, SCORES[score], MASKS[mask])


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("score", "mask"), [("alibi", "none"), ("numbers", "documents"), ("none", "prefix")])
def test_with_other_arguments(sequences, score, mask, other):
    q, ks, vs = sequences()
    for implementation in ("cpu-engine", "cpu-reference"):
        out, lse = flash_attn_varlen_func(
            q, np.concatenate(ks), np.concatenate(vs), CU_Q, CU_K, 30, 90, return_softmax_lse=True,
            implementation=implementation, **OTHERS[other][0], **functions(SCORES[score], MASKS[mask]),
        )  # fmt: skip
        check_sequences(out, lse, q, ks, vs, SCORES[score], MASKS[mask], OTHERS[other])


@pytest.mark.parametrize("name", ["flash_attn_varlen_func", "flash_attn_with_kvcache", "_flash_attn_fwd"])
@pytest.mark.parametrize(("score", "mask"), [("alibi", "prefix"), ("by row", "none"), ("none", "documents")])
def test_paged(sequences, rng, score, mask, name):
    """Keys of pages have no row in a packed tensor: offset_k is 0."""
    q, ks, vs = sequences(ml_dtypes.bfloat16)
    k_cache, v_cache, table = pages(rng, ks, vs, 16)
    more = functions(SCORES[score], MASKS[mask])
    if name == "flash_attn_varlen_func":
        out, lse = flash_attn_varlen_func(
            q, k_cache, v_cache, CU_Q, None, 30, None, block_table=table, seqused_k=USED, return_softmax_lse=True,
            **more,
        )  # fmt: skip
    elif name == "flash_attn_with_kvcache":
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=USED, block_table=table, cu_seqlens_q=CU_Q, return_softmax_lse=True,
            **more,
        )  # fmt: skip
    else:
        out, lse = _flash_attn_fwd(
            q, k_cache, v_cache, cu_seqlens_q=CU_Q, seqused_k=USED, page_table=table, return_lse=True, **more
        )
    check_sequences(out, lse, q, ks, vs, SCORES[score], MASKS[mask], packed_k=False)


def test_splits_and_threads(sequences):
    q, ks, vs = sequences()
    arguments = (q, np.concatenate(ks), np.concatenate(vs), CU_Q, CU_K, 30, 90)
    for options in ({"num_splits": 3}, {"num_splits": 1, "num_threads": 1}, {"deterministic": True}):
        out, lse = flash_attn_varlen_func(*arguments, return_softmax_lse=True, **options, **functions(alibi, documents))
        check_sequences(out, lse, q, ks, vs, alibi, documents)


def dense(normal, *shape, kv_heads=2, dtype=np.float32):
    batch, rows, keys = shape
    return (
        normal(batch, rows, HEADS, D, dtype=dtype),
        normal(batch, keys, kv_heads, D, dtype=dtype),
        normal(batch, keys, kv_heads, 16, dtype=dtype),
    )


def check_dense(out, lse, tensors, score_mod, mask_mod, keep=True, others=OTHERS["nothing"]):
    q, k, _ = tensors
    for b in range(len(q)):
        info = SimpleNamespace(seqlen_q=q.shape[1], seqlen_k=k.shape[1], offset_q=0, offset_k=0)
        score, kept, sinks = expected(b, info, score_mod, mask_mod, others)
        one = (x[b : b + 1].transpose(0, 2, 1, 3) for x in tensors)
        kept = kept & (keep if keep is True else keep[b : b + 1])
        check(out[b : b + 1].transpose(0, 2, 1, 3), *one, score, kept, lse=lse[b : b + 1], sinks=sinks)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_dense(normal, score, other, kv_heads):
    tensors = dense(normal, 2, 33, 70, kv_heads=kv_heads)
    out, lse = flash_attn_func(
        *tensors, return_softmax_lse=True, **OTHERS[other][0], **functions(SCORES[score], documents)
    )
    check_dense(out, lse, tensors, SCORES[score], documents, others=OTHERS[other])


def test_forward_ignores_windows_beside_a_mask_function(normal):
    """As FlashAttention 4 does; beside a score function alone they hold."""
    tensors = dense(normal, 1, 33, 70)
    for window in ({"causal": True}, {"window_size_left": 5, "window_size_right": 2}, {"window_size_left": -3}):
        out, lse = _flash_attn_fwd(*tensors, return_lse=True, **window, **functions(None, documents))
        check_dense(out, lse, tensors, None, documents)
    out, lse = _flash_attn_fwd(*tensors, return_lse=True, causal=True, **functions(alibi, None))
    check_dense(out, lse, tensors, alibi, None, others=OTHERS["causal"])


@pytest.mark.parametrize("function", [flash_attn_func, _flash_attn_fwd])
def test_block_sparse_tensors(normal, rng, function):
    tensors, size = dense(normal, 2, 150, 200), (32, 64)
    kinds = rng.integers(0, 3, (2, HEADS, 5, 4))
    lists = flashspark.BlockSparseTensors(*lists_of(rng, kinds, 1), *lists_of(rng, kinds, 2), size)
    info = SimpleNamespace(seqlen_q=150, seqlen_k=200, offset_q=0, offset_k=0)
    for mask_mod in (None, documents):
        plain = mask_mod and (lambda b, h, q, k: documents(b, h, q, k, info, AUX))
        keep = kept_by_lists(kinds, size, plain, 2, HEADS, 150, 200)
        out, lse = function(*tensors, return_lse=True, block_sparse_tensors=lists, **functions(alibi, mask_mod))
        check_dense(out, lse, tensors, alibi, None, keep)
    same = SimpleNamespace(**{**lists._asdict(), "block_size": None})  # 128 by 128
    coarse = rng.integers(0, 3, (1, 1, 2, 2))
    for name, value in zip(lists._fields, (*lists_of(rng, coarse, 1), *lists_of(rng, coarse, 2))):
        setattr(same, name, value)
    out, lse = function(*tensors, return_lse=True, block_sparse_tensors=same)
    check_dense(out, lse, tensors, None, None, kept_by_lists(coarse, (128, 128), None, 2, HEADS, 150, 200))


def test_block_sparse_tensors_of_packed_sequences(sequences, rng):
    """One list for each sequence, as long as the longest one needs."""
    q, ks, vs = sequences()
    kinds = rng.integers(0, 3, (3, 1, 2, 6))
    for b, (_, keys) in enumerate(LENGTHS):
        kinds[b, :, :, -(-keys // 16) :] = 0
    lists = flashspark.BlockSparseTensors(*lists_of(rng, kinds, 1), *lists_of(rng, kinds, 2), (16, 16))
    out, lse = flash_attn_varlen_func(
        q, np.concatenate(ks), np.concatenate(vs), CU_Q, CU_K, 30, 90, return_softmax_lse=True,
        block_sparse_tensors=lists,
    )  # fmt: skip
    for b in range(3):
        info = lengths_of(b)
        rows = slice(info.offset_q, info.offset_q + info.seqlen_q)
        keep = kept_by_lists(kinds[b : b + 1], (16, 16), None, 1, HEADS, *LENGTHS[b])
        tensors = (x.transpose(1, 0, 2)[None] for x in (q[rows], ks[b], vs[b]))
        check(out[rows].transpose(1, 0, 2)[None], *tensors, None, keep, lse=lse[None, :, rows])


def test_a_cache_that_grows(normal, sequences):
    """New rows are written before the functions see them, and not if the functions do not fit."""
    q = normal(3, 1, HEADS, D)
    _, ks, vs = sequences()
    caches = [np.zeros((3, 128, 2, D), np.float32) for _ in range(2)]
    for b in range(3):
        caches[0][b, : USED[b] - 1], caches[1][b, : USED[b] - 1] = ks[b][:-1], vs[b][:-1]
    new = [np.stack([x[b][-1:] for b in range(3)]) for x in (ks, vs)]
    before = caches[0].copy()
    with pytest.raises(flashspark.TraceError, match="the call gives 0"):
        flash_attn_with_kvcache(q, *caches, *new, cache_seqlens=USED - 1, score_mod=alibi)
    np.testing.assert_array_equal(caches[0], before)
    out = flash_attn_with_kvcache(
        q, *caches, *new, cache_seqlens=USED - 1, score_mod=alibi, mask_mod=causal_with_prefix, aux_tensors=AUX
    )
    for b in range(3):
        info = SimpleNamespace(seqlen_q=1, seqlen_k=int(USED[b]), offset_q=0, offset_k=0)
        score, keep, _ = expected(b, info, alibi, causal_with_prefix, OTHERS["nothing"])
        one = (q[b : b + 1].transpose(0, 2, 1, 3), ks[b].transpose(1, 0, 2)[None], vs[b].transpose(1, 0, 2)[None])
        check(out[b : b + 1].transpose(0, 2, 1, 3), *one, score, keep)


def test_fp8_keys_and_values(normal):
    e4m3 = ml_dtypes.float8_e4m3fn
    q, k, v = dense(normal, 2, 20, 70, dtype=ml_dtypes.bfloat16)
    k8, v8 = k.astype(e4m3), v.astype(e4m3)
    scale = np.full((2, 2), 0.5, np.float32)
    out, lse = flash_attn_func(
        q, k8, v8, k_descale=scale, v_descale=scale, return_softmax_lse=True, **functions(alibi, documents)
    )
    wide = [(x.astype(np.float32) * 0.5).astype(ml_dtypes.bfloat16) for x in (k8, v8)]
    check_dense(out, lse, (q, *wide), alibi, documents)


def test_other_tensors_and_numbers(normal):
    """Each call's own are read; a trace is kept, and keeps no tensor of a call alive."""
    tensors = dense(normal, 1, 9, 9)
    traced = flashspark._trace.traced(numbers, "score", "fa4", AUX, list(NUMBERS))
    for scalars in ((0.5, 1), (2.0, -1)):
        got = flash_attn_func(*tensors, score_mod=numbers, aux_tensors=AUX, aux_scalars=scalars)
        plain = lambda s, b, h, q, k: numbers(s, b, h, q, k, None, None, scalars)  # noqa: E731, B023
        check(got.transpose(0, 2, 1, 3), *(x.transpose(0, 2, 1, 3) for x in tensors), plain)
    again = flashspark._trace.traced(numbers, "score", "fa4", AUX, list(NUMBERS))
    assert again.result is traced.result

    def two(score, b, h, q_idx, kv_idx, info, aux):
        return score + aux[0][h] * aux[1][h]

    ones, twos = np.ones(HEADS, np.float32), np.full(HEADS, 2, np.float32)
    for aux in ([ones, ones], [ones, twos], [twos, twos], [twos, ones]):
        got = flash_attn_func(*tensors, score_mod=two, aux_tensors=aux, return_lse=True)[1]
        want = flash_attn_func(*tensors, return_lse=True)[1] + (aux[0] * aux[1])[:, None]
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-6)
    kept = [x for _, entry in flashspark._trace._known.values() if entry.face == "fa4" for x in entry.tensors]
    assert all(x is None for x in kept)


def test_explain(normal):
    tensors = dense(normal, 1, 9, 9)
    text = flashspark.attention_explain(flash_attn_func, *tensors, **functions(alibi, documents))
    assert "score_mod" in text and "mask_mod" in text
    assert "score_mod" in flash_attn_with_kvcache(*tensors, score_mod=alibi, aux_tensors=AUX, explain=True)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"aux_tensors": [SLOPES]}, ValueError, "aux_tensors = 1 values: must be None without score_mod"),
        ({"aux_scalars": (1,)}, ValueError, "aux_scalars = 1 values"),
        ({"aux_tensors": SLOPES, "score_mod": alibi}, TypeError, "aux_tensors = ndarray: must be a list or tuple"),
        ({"score_mod": alibi}, flashspark.TraceError, "entry 0 of aux_tensors or aux_scalars: the call gives 0"),
        ({"score_mod": alibi, "aux_tensors": [3]}, TypeError, r"aux_tensors\[0\] = an int"),
        ({"score_mod": 3}, TypeError, "must be callable"),
        ({"score_mod": lambda s, b, h, q, k: s}, flashspark.TraceError, "takes 5 positional arguments"),
        ({"block_sparse_tensors": 3}, TypeError, "must have the field mask_block_cnt"),
        (
            {"block_sparse_tensors": SimpleNamespace(mask_block_cnt=1, mask_block_idx=1, cu_total_m_blocks=1)},
            ValueError,
            "cu_total_m_blocks = given: must be None without cu_seqlens_q",
        ),
        ({"score_mod": alibi, "aux_tensors": [SLOPES[:2]]}, ValueError, "score_mod: index 2 of captured tensor 0"),
    ],
)
def test_errors(normal, options, error, match):
    with pytest.raises(error, match=match):
        flash_attn_func(*dense(normal, 1, 9, 9), **options)
