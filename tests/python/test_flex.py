"""flex_attention on NumPy arrays against float64, with every operation, list and mistake. No torch."""

from __future__ import annotations

import functools

import flashspark
import ml_dtypes
import numpy as np
import pytest
from flashspark import BlockMask, create_block_mask, flex_attention, flex_explain
from flashspark.mods import scalar
from flex_reference import attend, check, kept_by, kept_by_lists, lists_of

B, H, Q, K, D = 2, 4, 37, 53, 32
RNG = np.random.default_rng(7)
SLOPES = RNG.random(H).astype(np.float32)
BIAS = RNG.standard_normal((Q, K)).astype(np.float32)
TABLE = RNG.standard_normal((B, H, K))
HALF = RNG.standard_normal((H, K)).astype(np.float16)
BRAIN = RNG.standard_normal((B, 64)).astype(ml_dtypes.bfloat16)
DOCS = np.sort(RNG.integers(0, 4, 64)).astype(np.int32)
WIDE = RNG.integers(-3, 3, 64)
SMALL = RNG.integers(0, 200, 64).astype(np.uint8)
SHORT = RNG.integers(-90, 90, (64, 2)).astype(np.int16)
FLAGS = RNG.random(64) < 0.5
CAP = np.float32(3.0) * np.ones((), np.float32)

SCORES = {
    "identity": lambda s, b, h, q, k: s,
    "constant": lambda s, b, h, q, k: s * 0 + 1.5,
    "alibi": lambda s, b, h, q, k: s + SLOPES[h] * (k - q) / 8,
    "alibi, both sides": lambda s, b, h, q, k: s - SLOPES[h] * np.abs(q - k),
    "softcap": lambda s, b, h, q, k: 2.5 * np.tanh(s / 2.5),
    "softcap by a captured number": lambda s, b, h, q, k: CAP * np.tanh(s / CAP),
    "bias, 2-D": lambda s, b, h, q, k: s + BIAS[q, k],
    "bias, 3-D, float64": lambda s, b, h, q, k: s * TABLE[b, h, k],
    "float16": lambda s, b, h, q, k: s + HALF[h, k],
    "bfloat16": lambda s, b, h, q, k: s + BRAIN[b, k] / 2,
    "int64, from the end": lambda s, b, h, q, k: s + WIDE[-1 - k] * 0.25,
    "uint8 and int16": lambda s, b, h, q, k: s + SMALL[k] / 100.0 - SHORT[q, 1] / 64.0,
    "bool": lambda s, b, h, q, k: np.where(FLAGS[k], s * 2, s / 2),
    "integers": lambda s, b, h, q, k: s + ((q * 3 + k) % 7 - (q - k) // 5 + (k & 3) + (k | 8) + (q ^ k) % 5) * 0.05,
    "shifts": lambda s, b, h, q, k: s + ((k >> 2) + (1 << (q & 3)) + ~k + np.sign(q - k)) * 0.03,
    "floor division by negatives": lambda s, b, h, q, k: s + ((q - k) % -7 + (k - 30) // -4) * 0.1,
    "exp": lambda s, b, h, q, k: np.exp(s / 2) - np.expm1(s / 3) + np.exp2(-np.abs(s)),
    "log": lambda s, b, h, q, k: np.log(s * s + 1) + np.log2(np.abs(s) + 0.5) + np.log1p(s * s) - np.log10(2 + s * s),
    "trigonometry": lambda s, b, h, q, k: np.sin(s) + np.cos(2 * s) + np.tan(s / 4) + np.arctan(s),
    "inverse": lambda s, b, h, q, k: np.arcsin(np.sin(s) / 2) + np.arccos(np.cos(s) / 2) + np.arctan2(s, 1.5),
    "hyperbolic": lambda s, b, h, q, k: np.sinh(s / 3) + np.cosh(s / 4) + np.tanh(s),
    "roots": lambda s, b, h, q, k: np.sqrt(np.abs(s) + 0.1) + 1 / np.sqrt(s * s + 1) + np.abs(s) ** 1.5 / 4,
    "powers": lambda s, b, h, q, k: s**2 / 4 - s**3 / 20 + np.power(np.abs(s) + 0.5, s / 4),
    "rounding": lambda s, b, h, q, k: s + (np.floor(k / 3) + np.ceil(q / 7) + np.rint(k / 4) + np.trunc(q / 3)) * 0.1,
    "rounding of scores": lambda s, b, h, q, k: np.floor(s * 2) / 2 + np.trunc(s) / 4,
    "smaller and larger": lambda s, b, h, q, k: np.minimum(np.maximum(s, -0.5), k * 0.02) + np.clip(s, -1, 1),
    "comparisons": lambda s, b, h, q, k: s + (s > 0.25) * 0.5 - (s <= -0.5) * 0.25 + (q == k) * 2.0 + (k != 3) * 0.1,
    "float modulo": lambda s, b, h, q, k: s + (k * 0.75) % 1.25 + (k * -0.5) // 0.75 / 10,
    "selection": lambda s, b, h, q, k: np.where((h % 2 == 0) & ~FLAGS[k] | (q < 5), s, -s),
    "minus infinity": lambda s, b, h, q, k: np.where((q + k) % 3 == 0, -np.inf, s),
    "not a number": lambda s, b, h, q, k: np.where(np.isnan(np.log(s * 0 - 1)) & ~np.isinf(s), s * 1.25, 0),
    "sequence": lambda s, b, h, q, k: s * (b + 1) - h * 0.1 * (k < 9),
    "long": lambda s, b, h, q, k: functools.reduce(lambda x, n: np.sin(x) + SLOPES[h] * n / 10 + x / 2, range(9), s),
}
MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q >= k) & (q - k < 11),
    "documents": lambda b, h, q, k: DOCS[q] == DOCS[k],
    "prefix": lambda b, h, q, k: (k < 7 * (b + 1)) | (q >= k),
    "heads": lambda b, h, q, k: (k - q) % (h + 2) == 0,
    "odd rows": lambda b, h, q, k: q % 2 == 1,
    "nothing": lambda b, h, q, k: q < 0,
}


@pytest.fixture
def qkv(normal):
    """qkv(kv_heads, dtype, ...): query, key and value of head sizes 32 and 24."""

    def make(kv_heads=H, dtype=np.float32, rows=Q, keys=K, batch=B):
        shapes = (batch, H, rows, D), (batch, kv_heads, keys, D), (batch, kv_heads, keys, 24)
        return [normal(*shape, dtype=dtype) for shape in shapes]

    return make


def run(tensors, *args, **options):
    gqa = tensors[0].shape[1] != tensors[1].shape[1]
    return flex_attention(*tensors, *args, enable_gqa=gqa, return_lse=True, **options)


@pytest.mark.parametrize("name", SCORES)
def test_score_functions(qkv, name):
    tensors = qkv(kv_heads=2)
    for implementation in ("cpu-engine", "cpu-reference"):
        out, lse = run(tensors, SCORES[name], implementation=implementation)
        check(out, *tensors, SCORES[name], lse=lse)


@pytest.mark.parametrize("name", SCORES)
def test_half_precision(qkv, name):
    for dtype, mask in ((np.float16, "causal"), (ml_dtypes.bfloat16, "documents")):
        tensors = qkv(dtype=dtype)
        block_mask = create_block_mask(MASKS[mask], None, None, Q, K, "numpy", 16)
        out, lse = run(tensors, SCORES[name], block_mask)
        assert out.dtype == dtype and lse.dtype == np.float32
        check(out, *tensors, SCORES[name], kept_by(MASKS[mask], B, H, Q, K))


@pytest.mark.parametrize("score", [None, "alibi", "softcap", "bias, 2-D", "minus infinity"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(qkv, name, score):
    function = SCORES.get(score)
    for kv_heads, size in ((H, 128), (1, (16, 32))):
        tensors = qkv(kv_heads)
        mask = create_block_mask(MASKS[name], B, H, Q, K, "numpy", size)
        out, lse = run(tensors, function, mask)
        check(out, *tensors, function, kept_by(MASKS[name], B, H, Q, K), lse=lse)


@pytest.mark.parametrize("shape", [(1, 1), (B, 1), (1, H), (B, H)])
@pytest.mark.parametrize("size", [(16, 16), (16, 128), (128, 32), (48, 64), (80, 16)])
def test_lists_say_what_is_computed(qkv, rng, size, shape):
    """Blocks of any kind at any place, whatever the mask function says; full ones do not ask it."""
    rows, keys = 131, 203
    tensors = qkv(2, rows=rows, keys=keys)
    kinds = rng.integers(0, 3, (*shape, -(-rows // size[0]), -(-keys // size[1])))
    kinds[:, :, 0] = 0
    lists = [x for kind in (1, 2) for x in lists_of(rng, kinds, kind)]
    for name in ("causal", "heads"):
        mask = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=size, mask_mod=MASKS[name], seq_lengths=(rows, keys), compute_q_blocks=False
        )
        keep = kept_by_lists(kinds, size, MASKS[name], B, H, rows, keys)
        for function in (None, SCORES["alibi"]):
            out, lse = run(tensors, function, mask)
            check(out, *tensors, function, keep, lse=lse)
            assert (out[:, :, : size[0]] == 0).all() and (lse[:, :, : size[0]] == -np.inf).all()


def test_lists_without_full_ones(qkv, rng):
    tensors = qkv(rows=64, keys=96)
    kinds = rng.integers(0, 2, (1, 1, 4, 3))
    mask = BlockMask.from_kv_blocks(*lists_of(rng, kinds, 1), BLOCK_SIZE=(16, 32), compute_q_blocks=False)
    assert mask.seq_lengths == (64, 96)
    check(run(tensors, None, mask)[0], *tensors, None, kept_by_lists(kinds, (16, 32), None, B, H, 64, 96))
    narrow = BlockMask.from_kv_blocks(
        np.ones((1, 1, 4), np.int32), np.full((1, 1, 4, 1), 2, np.int32), BLOCK_SIZE=(16, 32), seq_lengths=(64, 96),
        compute_q_blocks=False,
    )  # fmt: skip
    only = np.broadcast_to(np.arange(96) >= 64, (B, H, 64, 96))
    check(run(tensors, None, narrow)[0], *tensors, None, only)


def test_contents_may_change(qkv):
    """Captured arrays and numbers that change between calls are seen, without another trace."""
    tensors, slopes, cut, factor, start = qkv(), np.ones(H, np.float32), np.array([30, 9]), scalar(0.5), scalar(3)

    def score(s, b, h, q, k):
        return s + slopes[h] * factor * (k - start)

    def mask(b, h, q, k):
        return (k < cut[b]) & (k >= start)

    full = kept_by(lambda b, h, q, k: k >= 0, B, H, Q, K)
    kinds = np.ones((1, 1, 1, 1), np.int64)
    lists = BlockMask.from_kv_blocks(
        *lists_of(RNG, kinds, 1), mask_mod=mask, seq_lengths=(Q, K), compute_q_blocks=False
    )
    traces = []
    for _ in range(2):
        keep = full & (np.arange(K) < cut[:, None, None, None]) & (np.arange(K) >= start.value)
        plain = lambda s, b, h, q, k: s + slopes[h] * factor.value * (k - start.value)  # noqa: E731
        out, lse = run(tensors, score, lists)
        check(out, *tensors, plain, keep, lse=lse)
        traces.append(flashspark._trace.traced(score, "score"))
        slopes[:], cut[:], factor.value, start.value = [0.1, 0.2, 0.3, 0.4], [11, 50], -0.25, 1
    assert traces[0] is traces[1]
    with pytest.raises(TypeError, match=r"value = 1.5: must be an int"):
        start.value = 1.5
    factor.value = 2
    assert factor.value == 2.0 and isinstance(factor.value, float) and repr(start) == "flashspark.mods.scalar(1)"


def test_other_numbers_are_seen(qkv):
    """A number in a closure that changes makes another function."""
    tensors, width = qkv(), 5

    def window(b, h, q, k):
        return (q >= k) & (q - k < width)

    mask = create_block_mask(window, None, None, Q, K, "numpy", 16)
    check(run(tensors, None, mask)[0], *tensors, None, kept_by(window, B, H, Q, K))
    kinds = np.zeros((1, 1, 3, 4), np.int64)
    _, _, *lists = mask.as_tuple()
    for kind, (counts, indices) in ((1, lists[:2]), (2, lists[2:4])):
        for row in range(3):
            kinds[0, 0, row, indices[0, 0, row, : counts[0, 0, row]]] = kind
    width = 30  # the lists are still those of 5
    check(run(tensors, None, mask)[0], *tensors, None, kept_by_lists(kinds, (16, 16), window, B, H, Q, K))


@pytest.mark.parametrize(
    ("options", "built_in"),
    [
        ({"score_mod": SCORES["alibi, both sides"]}, "alibi"),
        ({"score_mod": SCORES["softcap"]}, "softcap"),
        ({"score_mod": lambda s, b, h, q, k: np.where(q >= k, s, -np.inf)}, "causal"),
        ({"score_mod": SCORES["identity"]}, ""),
    ],
)
def test_recognised_functions_are_not_compiled(qkv, options, built_in):
    tensors = qkv(keys=Q)
    text = flex_explain(*tensors, **options)
    assert "score_mod" not in text and built_in in text, text
    check(flex_attention(*tensors, **options), *tensors, options["score_mod"])


def test_masks_that_need_no_lists(qkv):
    """Only the lists of create_block_mask, unchanged, may be left out."""
    tensors = qkv(keys=Q)
    make = functools.partial(create_block_mask, MASKS["window"], None, None, Q, Q, "numpy", 16)
    noop = create_block_mask(flashspark.noop_mask, 1, 1, Q, Q, "numpy")
    for mask in (make(), noop, make().to("cpu")):
        assert "block lists" not in flex_explain(*tensors, block_mask=mask)
        check(flex_attention(*tensors, block_mask=mask), *tensors, None, kept_by(mask.mask_mod, B, H, Q, Q))
    changed, replaced, other = make(), make(), make()
    changed.kv_num_blocks[0, 0, 1] = 0
    replaced.full_kv_indices = replaced.full_kv_indices.copy()
    other.mask_mod = MASKS["causal"]
    for mask in (changed, replaced, other, make()._adjust(Q, Q), BlockMask.from_kv_blocks(*make().as_tuple()[2:6], 16)):
        assert "block lists" in flex_explain(*tensors, block_mask=mask)
    assert (run(tensors, None, changed)[1][:, :, 16:27] == -np.inf).all()


def test_alibi_of_more_heads_is_not_built_in(qkv):
    tensors, slopes = qkv(keys=Q), np.arange(9, dtype=np.float32) / 8
    score = lambda s, b, h, q, k: s - slopes[h] * np.abs(q - k)  # noqa: E731
    check(flex_attention(*tensors, score), *tensors, score)
    strided = slopes[::2]
    score_too = lambda s, b, h, q, k: s - strided[h] * np.abs(q - k)  # noqa: E731
    check(flex_attention(*tensors, score_too), *tensors, score_too)


def test_shapes_and_scale(qkv):
    for rows, keys, batch in ((1, 200, 1), (130, 1, 3), (1, 1, 1)):
        tensors = qkv(rows=rows, keys=keys, batch=batch)
        bias = RNG.standard_normal(keys).astype(np.float32)
        score = lambda s, b, h, q, k: s + bias[k]  # noqa: E731, B023
        out, lse = run(tensors, score, scale=0.3)
        check(out, *tensors, score, scale=0.3, lse=lse)
    q, k, v = qkv()
    score = SCORES["bias, 2-D"]
    check(flex_attention(q, k[:1], v[:1], score), q, k[:1], v[:1], score)
    assert flex_attention(q, k, v, score, kernel_options={"BLOCK_M": 64}).shape == (B, H, Q, 24)


def test_read_only_and_strided_captures(qkv):
    tensors = qkv()
    wide = np.broadcast_to(RNG.standard_normal((1, K)).astype(np.float32), (H, K))
    turned = np.asfortranarray(BIAS)[:, ::-1]
    score = lambda s, b, h, q, k: s + wide[h, k] + turned[q, k]  # noqa: E731
    check(flex_attention(*tensors, score), *tensors, score)


def test_lse_and_aux(qkv):
    class Request:
        lse, max_scores = True, False

    tensors = qkv()
    out, aux = flex_attention(*tensors, SCORES["alibi"], return_aux=Request)
    np.testing.assert_array_equal(aux.lse, run(tensors, SCORES["alibi"])[1])
    assert aux.max_scores is None and out.shape == (B, H, Q, 24)
    Request.max_scores = True
    with pytest.raises(NotImplementedError, match="max_scores"):
        flex_attention(*tensors, return_aux=Request)


def test_deterministic(qkv):
    tensors = qkv()
    first = flex_attention(*tensors, SCORES["long"])
    np.testing.assert_array_equal(first, flex_attention(*tensors, SCORES["long"]))


BAD = [
    (lambda s, b, h, q, k: s + SLOPES[h + 1], r"score_mod: index 4 of captured tensor 0 is outside dimension 0 of 4"),
    (lambda s, b, h, q, k: s + BIAS[q, k - 60], r"index -60 of captured tensor 0 is outside dimension 1 of 53"),
]


@pytest.mark.parametrize(("score", "match"), BAD)
def test_indices_out_of_range(qkv, score, match):
    for implementation in ("cpu-engine", "cpu-reference"):
        with pytest.raises(ValueError, match=match):
            flex_attention(*qkv(), score, implementation=implementation)


def test_indices_out_of_range_where_no_key_is_kept(qkv):
    tensors, short = qkv(), np.arange(20, dtype=np.float32)
    score = lambda s, b, h, q, k: s + short[k]  # noqa: E731
    mask = create_block_mask(lambda b, h, q, k: k < 20, None, None, Q, K, "numpy")
    padded = lambda s, b, h, q, k: s + np.pad(short, (0, K))[k]  # noqa: E731
    check(run(tensors, score, mask)[0], *tensors, padded, kept_by(mask.mask_mod, B, H, Q, K))
    with pytest.raises(ValueError, match=r"mask_mod: index 20 of captured tensor 0"):
        outside = lambda b, h, q, k: short[k] > 3  # noqa: E731
        kinds = np.ones((1, 1, 1, 1), np.int64)
        run(tensors, None, BlockMask.from_kv_blocks(*lists_of(RNG, kinds, 1), mask_mod=outside, seq_lengths=(Q, K)))


def _lists(**changes):
    lists = {
        "kv_num_blocks": np.ones((1, 1, 3), np.int32),
        "kv_indices": np.zeros((1, 1, 3, 4), np.int32),
        "full_kv_num_blocks": np.zeros((1, 1, 3), np.int32),
        "full_kv_indices": np.zeros((1, 1, 3, 4), np.int32),
        **changes,
    }
    size = lists.pop("BLOCK_SIZE", 16)
    lengths = lists.pop("seq_lengths", (Q, K))
    return BlockMask.from_kv_blocks(
        **lists, BLOCK_SIZE=size, mask_mod=MASKS["causal"], seq_lengths=lengths, compute_q_blocks=False
    )


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"kv_num_blocks": np.full((1, 1, 3), 5, np.int32)},
            ValueError,
            r"^block_mask\.kv_num_blocks\[0, 0, 0\] = 5: must be from 0 to",
        ),
        (
            {"kv_num_blocks": np.full((1, 1, 3), -1, np.int32)},
            ValueError,
            r"^block_mask\.kv_num_blocks\[0, 0, 0\] = -1",
        ),
        (
            {"kv_indices": np.full((1, 1, 3, 4), 4, np.int32)},
            ValueError,
            r"^block_mask\.kv_indices\[0, 0, 0, 0\] = 4: must name",
        ),
        (
            {"kv_indices": np.full((1, 1, 3, 4), -1, np.int32)},
            ValueError,
            r"^block_mask\.kv_indices\[0, 0, 0, 0\] = -1",
        ),
        (
            {"kv_num_blocks": np.ones((1, 1, 3), np.int64)},
            TypeError,
            r"^block_mask\.kv_num_blocks\.dtype = int64: must be int32",
        ),
        (
            {"full_kv_indices": np.zeros((1, 1, 3, 4), np.float32)},
            TypeError,
            r"^block_mask\.full_kv_indices\.dtype = float32",
        ),
        ({"BLOCK_SIZE": (24, 16), "seq_lengths": (72, K)}, ValueError, "block_mask.seq_lengths"),
        ({"BLOCK_SIZE": (17, 16)}, ValueError, r"^block_mask\.BLOCK_SIZE\[0\] = 17: must be a multiple of 16"),
        ({"BLOCK_SIZE": (16, 15)}, ValueError, r"^block_mask\.BLOCK_SIZE\[1\] = 15: must be a multiple of 16"),
        ({"seq_lengths": (Q + 16, K)}, ValueError, r"block_mask.seq_lengths = \(53, 53\): must be the lengths"),
        ({"seq_lengths": (Q, K - 16)}, ValueError, r"_adjust\(37, 53\)"),
    ],
)
def test_bad_lists(qkv, changes, error, match):
    with pytest.raises(error, match=match):
        flex_attention(*qkv(), block_mask=_lists(**changes))


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2, 2)])
def test_lists_of_another_batch(qkv, shape):
    mask = _lists(**{
        name: np.zeros((*shape, 3, *rest), np.int32)
        for prefix in ("", "full_")
        for name, rest in ((f"{prefix}kv_num_blocks", ()), (f"{prefix}kv_indices", (4,)))
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"^block_mask\.kv_num_blocks\.shape\[[01]\] = \d: must be 1 or"):
        flex_attention(*qkv(), block_mask=mask)


def test_bad_tensors(qkv):
    q, k, v = qkv()
    for tensors, error, match in (
        ((q, k[:, :2], v[:, :2]), ValueError, "enable_gqa must be True"),
        ((q[0], k, v), ValueError, r"query.shape = \(4, 37, 32\): must be"),
        ((None, k, v), TypeError, "query = None"),
        ((q, [1], v), TypeError, "key = a list"),
        ((q, k, v.astype(np.float64)), ValueError, "value.dtype = float64"),
        ((q, np.repeat(k, 2, 0), v), ValueError, r"key.shape\[0\] = 4: must be query's 2, or 1"),
        ((q.astype(np.float64), k.astype(np.float64), v.astype(np.float64)), TypeError, "float64"),
        ((q, k[:, :, :9], v), ValueError, r"^value\.shape\[2\] = 53: must be k's, 9"),
    ):
        with pytest.raises(error, match=match):
            flex_attention(*tensors)
    with pytest.raises(ValueError, match="must be False with return_aux"):
        flex_attention(q, k, v, return_lse=True, return_aux=object())
    with pytest.raises(TypeError, match="must be a BlockMask"):
        flex_attention(q, k, v, block_mask=3)
    with pytest.raises(flashspark.TraceError, match="must return one number"):
        flex_attention(q, k, v, lambda s, b, h, q, k: (s, s))
    names = np.array(["a", "b"])
    with pytest.raises(flashspark.TraceError, match="a captured tensor of <U1"):
        flex_attention(q, k, v, lambda s, b, h, q, k: s + names[k])


def test_many_captured_tensors(qkv):
    tensors = qkv()
    for count, error in ((16, None), (17, "reads 17 tensors: must be at most 16")):
        tables = [RNG.standard_normal(K).astype(np.float32) for _ in range(count)]
        score = lambda s, b, h, q, k: s + sum(t[k] for t in tables) / 8  # noqa: E731, B023
        if error is None:
            check(flex_attention(*tensors, score), *tensors, score)
        else:
            with pytest.raises(flashspark.TraceError, match=error):
                flex_attention(*tensors, score)


def test_no_tokens(qkv):
    for rows, keys, batch in ((0, 5, 1), (5, 0, 1), (5, 5, 0)):
        out, lse = run(qkv(rows=rows, keys=keys, batch=batch), SCORES["exp"])
        assert out.shape == (batch, H, rows, 24) and (out == 0).all() and (lse == -np.inf).all()


def test_reference_of_these_tests(qkv):
    """The oracle itself, on a case that is worked out by hand."""
    q, k, v = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 3, 2)), np.array([[[[1.0], [2.0], [4.0]]]])
    out, lse = attend(q, k, v, lambda s, b, h, q, k: s + np.log(k + 1.0), np.array([[[[1, 0, 1]]]]))
    assert abs(out[0, 0, 0, 0] - 13 / 4) < 1e-12 and abs(lse[0, 0, 0] - np.log(4)) < 1e-12
