"""Further calls of flex_attention with the same functions: what has changed since the first is seen. No torch."""

from __future__ import annotations

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest
from flashspark import BlockMask, _flex_call, _user_functions, create_block_mask, flash_attn_func, flex, flex_attention
from flashspark.mods import scalar
from flex_reference import check, counted, kept_by

B, H, Q, K, D = 2, 4, 37, 53, 32
RNG = np.random.default_rng(11)
GLOBAL = RNG.standard_normal(K).astype(np.float32)


@pytest.fixture
def qkv(normal):
    def make(rows=Q, keys=K, batch=B, dtype=np.float32, kv_heads=H):
        shapes = (batch, H, rows, D), (batch, kv_heads, keys, D), (batch, kv_heads, keys, D)
        return [normal(*shape).astype(dtype) for shape in shapes]

    return make


@pytest.fixture
def general(monkeypatch):
    """How many calls have taken the general path."""
    monkeypatch.setattr(_flex_call, "_known", {})
    return counted(monkeypatch, flex, "_run")


def both(tensors, score=None, mask=None, keep=None, **options):
    """Checks a call with its lse against float64."""
    out, lse = flex_attention(*tensors, score, mask, return_lse=True, **options)
    if keep is None and mask is not None:
        keep = kept_by(mask.mask_mod, B, H, tensors[0].shape[2], tensors[1].shape[2])
    check(out, *tensors, score, keep, lse=lse)


def bias_of(table):
    return lambda s, b, h, q, k: s + table[k]


def prefix_of(length):
    return lambda b, h, q, k: (k < length) | (q >= k)


def numpy_mask(mask_mod, rows=Q, keys=K):
    return create_block_mask(mask_mod, None, None, rows, keys, "numpy", BLOCK_SIZE=16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "score", "captured", "recognised", "mask", "served mask", "both"])
def test_warm_calls(qkv, general, kind, dtype):
    score = {
        "score": lambda s, b, h, q, k: s * 1.5 + q * 0.01,
        "captured": bias_of(GLOBAL),
        "recognised": lambda s, b, h, q, k: 2.0 * np.tanh(s / 2.0),
        "both": bias_of(GLOBAL),
    }.get(kind)
    mask_mod = {"mask": prefix_of(5), "served mask": lambda b, h, q, k: q >= k, "both": prefix_of(5)}.get(kind)
    mask = None if mask_mod is None else numpy_mask(mask_mod)
    for call in range(3):
        both(qkv(dtype=dtype), score, mask)
        assert len(general) == 1, call


def test_contents_of_captured_arrays(qkv, general):
    table = GLOBAL.copy()
    score, tensors = bias_of(table), qkv()
    for _ in range(3):
        both(tensors, score)
        table[:] = RNG.standard_normal(K)
    assert len(general) == 1


def test_names_bound_to_other_objects(qkv, general):
    factor, table = 0.5, GLOBAL.copy()

    def score(s, b, h, q, k):
        return s * factor + table[k] * GLOBAL[q]

    tensors = qkv()
    both(tensors, score)
    factor = 0.75
    both(tensors, score)
    table = RNG.standard_normal(K)  # of another type, too
    both(tensors, score)
    table = RNG.standard_normal(K)
    both(tensors, score)
    assert len(general) == 4
    both(tensors, score)
    assert len(general) == 4


def test_globals_and_defaults(qkv, monkeypatch):
    tensors = qkv()

    def score(s, b, h, q, k, factor=0.5):
        return s * factor + GLOBAL[k]

    both(tensors, score)
    monkeypatch.setitem(globals(), "GLOBAL", RNG.standard_normal(K).astype(np.float32))
    both(tensors, score)
    score.__defaults__ = (0.25,)
    both(tensors, score)


def test_scalars(qkv, general):
    strength, slope = scalar(0.5), scalar(2)
    mask_mod = lambda b, h, q, k: (q >= k) | (k < slope)  # noqa: E731
    score = lambda s, b, h, q, k: s * strength  # noqa: E731
    tensors, mask = qkv(), numpy_mask(prefix_of(99))
    mask.mask_mod = mask_mod
    for strength_now, slope_now in ((0.5, 2), (0.75, 40), (0, 0)):
        strength.value, slope.value = strength_now, slope_now
        out = flex_attention(*tensors, score, mask)
        expected = kept_by(lambda b, h, q, k, n=slope_now: (q >= k) | (k < n), B, H, Q, K)
        # Blocks that were listed as full do not ask the new function.
        expected = expected | kept_by(prefix_of(99), B, H, Q, K) & (np.arange(K) < 48) & (np.arange(Q)[:, None] < 32)
        check(out, *tensors, lambda s, b, h, q, k, x=strength_now: s * x, expected)
    assert len(general) == 1


def test_other_lengths_and_batches(qkv, general):
    score = bias_of(RNG.standard_normal(200).astype(np.float32))
    for _ in range(2):
        for rows, keys, batch in ((Q, K, B), (Q, K + 3, B), (1, 200, B), (Q, K, 1)):
            both(qkv(rows, keys, batch), score)
    assert len(general) == 4
    for keys in range(1, 60):  # as many as are kept, and more
        both(qkv(1, keys), score)
    both(qkv(1, 59), score)
    assert len(general) == 63


def test_lengths_decide_what_is_served(qkv):
    """A causal mask counts from the first query and key: built in only where the lengths are equal."""
    for rows, keys in ((K, K), (Q, K), (K, K), (Q, K)):
        causal = lambda b, h, q, k: q >= k  # noqa: E731
        mask = numpy_mask(causal, rows, keys)
        for _ in range(2):
            both(qkv(rows, keys), None, mask)


def test_slopes_that_change(qkv):
    slopes = RNG.random(H).astype(np.float32)
    score, tensors = lambda s, b, h, q, k: s - slopes[h] * np.abs(q - k), qkv(K, K)
    for _ in range(3):
        both(tensors, score)
        slopes[:] = RNG.random(H)


def test_lists_changed_in_place(qkv):
    """A mask that a built-in parameter stands for, until its lists say something else."""
    mask, tensors = numpy_mask(lambda b, h, q, k: q >= k, 48, 48), qkv(48, 48)
    for _ in range(2):
        both(tensors, None, mask)
    mask.full_kv_num_blocks[..., 2] = 1  # of two blocks before the diagonal
    keep = kept_by(mask.mask_mod, B, H, 48, 48).copy()
    keep[:, :, 32:, 16:32] = False
    for _ in range(2):
        both(tensors, None, mask, keep)


def test_fields_of_a_mask_that_change(qkv):
    mask, tensors = numpy_mask(prefix_of(5)), qkv()
    for _ in range(2):
        both(tensors, None, mask)
    mask.mask_mod = prefix_of(3)  # a list of full blocks does not ask it
    keep = kept_by(mask.mask_mod, B, H, Q, K)
    for _ in range(2):
        both(tensors, None, mask, keep)
    mask.kv_num_blocks = np.zeros_like(mask.kv_num_blocks)
    mask.full_kv_num_blocks = np.zeros_like(mask.full_kv_num_blocks)
    for _ in range(2):
        both(tensors, None, mask, np.zeros((B, H, Q, K), bool))
    mask.seq_lengths = (Q + 16, K)
    with pytest.raises(ValueError, match=r"block_mask\.seq_lengths"):
        flex_attention(*tensors, None, mask)


def test_lists_that_are_wrong_later(qkv):
    mask, tensors = numpy_mask(prefix_of(5)), qkv()
    both(tensors, None, mask)
    mask.kv_num_blocks[0, 0, 1] = 77
    with pytest.raises(ValueError, match=r"^block_mask\.kv_num_blocks\[0, 0, 1\] = 77: must be from 0 to"):
        flex_attention(*tensors, None, mask)


def test_bound_methods(qkv, general):
    class Layer:
        def __init__(self, factor):
            self.factor = factor

        def score(self, s, b, h, q, k):
            return s * self.factor

    layers, tensors = [Layer(0.5), Layer(2.0)], qkv()
    for _ in range(2):
        for layer in layers:
            both(tensors, layer.score)
    assert len(general) == 2
    layers[0].factor = 0.25
    both(tensors, layers[0].score)
    Layer.score = lambda self, s, b, h, q, k: s - self.factor
    both(tensors, layers[0].score)


def test_masks_of_other_kinds(qkv):
    """An object with a mask's fields, some of which are made at each access."""

    class Other:
        def __init__(self, mask):
            self.mask = mask

        def __getattr__(self, name):
            return getattr(self.mask, name)

        @property
        def kv_num_blocks(self):
            return self.mask.kv_num_blocks.copy()

    tensors, mask = qkv(), Other(numpy_mask(prefix_of(5)))
    for _ in range(2):
        both(tensors, None, mask)
    mask.mask.kv_num_blocks[:] = 0
    mask.mask.full_kv_num_blocks[:] = 0
    both(tensors, None, mask, np.zeros((B, H, Q, K), bool))


def test_mistakes_in_later_calls(qkv):
    score, tensors = bias_of(GLOBAL), qkv(kv_heads=2)
    q, k, v = tensors
    both(tensors, score, enable_gqa=True)
    with pytest.raises(ValueError, match="enable_gqa must be True"):
        flex_attention(q, k, v, score)
    for wrong, error, match in (
        ((q, k, v[:, :, :9]), ValueError, r"^value\.shape\[2\] = 9: must be k's, 53"),
        ((q, k, v[:, :1]), ValueError, r"^value\.shape\[1\] = 1: must be k's, 2"),
        ((q, k, v.astype(np.float64)), ValueError, r"^value\.dtype = float64"),
        ((q, k, v[0]), ValueError, r"^value\.shape = \(2, 53, 32\)"),
        ((q, k, list(v)), TypeError, "^value = a list"),
    ):
        with pytest.raises(error, match=match):
            flex_attention(*wrong, score, enable_gqa=True)
    with pytest.raises(ValueError, match=r"^scale = nan"):
        flex_attention(*tensors, score, scale=float("nan"), enable_gqa=True)
    with pytest.raises(TypeError, match=r"^scale = a str|scale"):
        flex_attention(*tensors, score, scale="1", enable_gqa=True)
    with pytest.raises((ValueError, NotImplementedError), match="implementation"):
        flex_attention(*tensors, score, implementation="gpu", enable_gqa=True)
    both(tensors, score, enable_gqa=True, implementation="cpu-reference")


def test_strides(qkv, general):
    """Views are taken as they are, in any order of memory."""
    score = bias_of(GLOBAL)
    q, k, v = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in qkv())
    for _ in range(2):
        both((q, k, v), score)
    wide = np.zeros((B, H, K, 2 * D), np.float32)
    wide[..., ::2] = v
    both((q, k, wide[..., ::2]), score)  # copied by the general path
    assert len(general) == 2


def test_nothing_is_kept_of_what_is_gone(qkv):
    tensors = qkv()
    gc.collect()
    before = len(_flex_call._known)
    for n in range(20):
        mask = numpy_mask(prefix_of(n))
        flex_attention(*tensors, bias_of(GLOBAL), mask)
    del mask
    gc.collect()
    assert len(_flex_call._known) == before


def test_functions_without_weak_references(qkv):
    class Score:
        __slots__ = ()

        def __call__(self, s, b, h, q, k):
            return s * 0.5

    tensors = qkv()
    for _ in range(2):
        both(tensors, Score())


def test_read_only_arrays(qkv, general):
    """Which NumPy exports in another way, at each call."""
    table = GLOBAL.copy()
    table.flags.writeable = False
    tensors, score = qkv(), bias_of(table)
    for _ in range(2):
        both(tensors, score)
    assert len(general) == 2


def test_from_kv_blocks(qkv, general):
    counts, indices = np.ones((1, 1, 3), np.int32), np.zeros((1, 1, 3, 4), np.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, seq_lengths=(Q, K), compute_q_blocks=False)
    keep = np.zeros((B, H, Q, K), bool)
    keep[..., :16] = True
    for _ in range(3):
        both(qkv(), None, mask, keep)
    assert len(general) == 1


@pytest.fixture
def traces(monkeypatch):
    """How many functions of FlashAttention 4 were looked up, which later calls leave out."""
    monkeypatch.setattr(_user_functions, "_known", {})
    return counted(monkeypatch, _user_functions, "traced")


def fa4(tensors, score, mask, on_numpy, keep=None, **options):
    """The same of flash_attn_func; on_numpy, keep: what its functions compute, for these aux_tensors."""
    rows = [x.transpose(0, 2, 1, 3) for x in tensors]
    out, lse = flash_attn_func(*rows, score_mod=score, mask_mod=mask, return_softmax_lse=True, **options)
    check(out.transpose(0, 2, 1, 3), *tensors, on_numpy, None if keep is None else kept_by(keep, B, H, Q, K), lse=lse)


def test_fa4(qkv, traces):
    factor, strength, tensors = 0.5, scalar(1.5), qkv()

    def score(s, b, h, q, k, info, aux):
        return s * factor + aux[0][h, k] * strength + GLOBAL[k]

    def mask(b, h, q, k, info, aux):
        return (k < aux[1][b]) | (q >= k)

    def call():
        table = RNG.standard_normal((H, K)).astype(np.float32)
        first = RNG.integers(0, K, B).astype(np.int32)
        now = factor, strength.value
        on_numpy = lambda s, b, h, q, k: s * now[0] + table[h, k] * now[1] + GLOBAL[k]  # noqa: E731
        fa4(tensors, score, mask, on_numpy, lambda b, h, q, k: (k < first[b]) | (q >= k), aux_tensors=[table, first])

    for _ in range(3):
        call()
        strength.value += 0.25
    assert len(traces) == 2
    factor = 0.75
    call()
    call()
    assert len(traces) == 4


def test_fa4_with_other_aux_tensors(qkv):
    score = lambda s, b, h, q, k, info, aux: s + aux[0][k] * aux[1][k]  # noqa: E731
    tensors, wide = qkv(), RNG.standard_normal(K)
    a, b = (RNG.standard_normal(K).astype(np.float32) for _ in range(2))
    for first, second in ((a, b), (b, a), (a, a), (a, b), (a.astype(np.float16), b), (wide, b), (a, b)):
        on_numpy = lambda s, b, h, q, k, x=first, y=second: s + x.astype(np.float32)[k] * y[k]  # noqa: E731
        fa4(tensors, score, None, on_numpy, aux_tensors=[first, second])
    with pytest.raises(Exception, match="aux_tensors"):
        fa4(tensors, score, None, None, aux_tensors=[a])
    with pytest.raises(TypeError, match=r"^aux_tensors\[1\] = a list"):
        fa4(tensors, score, None, None, aux_tensors=[a, list(b)])


def test_fa4_whose_trace_depends_on_a_shape(qkv):
    score = lambda s, b, h, q, k, info, aux: s * aux[0].shape[0] + aux[0][0]  # noqa: E731
    for count in (1, 2, 2, 3):
        table = RNG.standard_normal(count).astype(np.float32)
        on_numpy = lambda s, b, h, q, k, x=table: s * len(x) + x[0]  # noqa: E731
        fa4(qkv(), score, None, on_numpy, aux_tensors=[table])


def test_fa4_keeps_no_aux_tensors(qkv):
    score = lambda s, b, h, q, k, info, aux: s + aux[0][k]  # noqa: E731
    table = RNG.standard_normal(K).astype(np.float32)
    kept = weakref.ref(table)
    fa4(qkv(), score, None, lambda s, b, h, q, k: s + kept()[k], aux_tensors=[table])
    del table
    gc.collect()
    assert kept() is None
