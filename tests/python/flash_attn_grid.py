"""The parameter grids of flash-attention's forward tests, with our own oracle in float64.

A Case names one point of a grid; `make` builds the call in NumPy, with the result that flash-attention defines for it.
tests/python runs samples on the CPU, tests/gpu on a GPU, test_doors.py a few points through every door.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from problems import offsets
from reference import close, wide

DTYPES: dict[str, Any] = {
    **{"float32": np.float32, "float16": np.float16},
    **{"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn},
}
HEAD_DIMS = [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
WIDTHS_OF_V = {64: (64, 256, 512), 128: (128, 64), 192: (192, 128)}  # where flash-attention 3 allows others than q's
HEADS = {"mha": (6, 6), "gqa": (6, 3), "mqa": (6, 1)}
PAGE_SIZES = [None, 1, 4, 16, 20, 48, 256, 784]
KINDS = ("dense", "varlen", "cache")
UNTOUCHED = 7.0  # initial content of rows of `out` and `lse` that no call may write


@dataclass(frozen=True)
class Case:
    kind: str = "dense"  # flash_attn_func, flash_attn_varlen_func (packed or paged), flash_attn_with_kvcache
    batch: int = 2
    longest: tuple[int, int] = (37, 61)  # queries, keys
    heads: tuple[int, int] = (6, 3)
    dims: tuple[int, int] = (64, 64)
    dtype: str = "bfloat16"
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    softcap: float = 0.0
    scale: float | None = None
    alibi: int = 0  # 1: one slope per head, 2: one per sequence and head
    sinks: bool = False
    deterministic: bool = False
    num_splits: int = 0
    given: int = 0  # 1: the caller passes out, 2: lse as well
    lengths: str = "random"  # varlen: full, random, third, zero
    unused: bool = False  # varlen: unused rows and keys between the sequences
    page_size: int | None = None
    new: int = 0  # cache: number of rows to append
    rotary: float = 0.0
    interleaved: bool = False
    rotary_seqlens: bool = False
    leftpad: bool = False
    batch_idx: bool = False
    varlen_q: bool = False
    metadata: bool = False  # pass get_scheduler_metadata's result
    seed: int = 0


@dataclass
class Call:
    """arrays and options are keyword arguments of `function`; out and lse are the expected results of the rows in
    use."""

    case: Case
    function: str
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    out: np.ndarray  # (rows of q, heads, width of v)
    lse: np.ndarray  # (rows of q, heads)
    rows: np.ndarray  # (rows of q,) of bool: in use
    caches: dict[str, np.ndarray] = field(default_factory=dict)  # expected content of k_cache and v_cache


def today() -> int:
    """The seed of the samples: a new one every day, unless FLASHSPARK_GRID_SEED sets it."""
    return int(
        os.environ.get("FLASHSPARK_GRID_SEED") or datetime.datetime.now(datetime.timezone.utc).strftime("%y%m%d")
    )


def draw(kind: str, number: int, seed: int, sizes: list[tuple[int, int]], dtypes: list[str]) -> Case:
    """The number-th sample. Head sizes and page sizes rotate, so that a few dozen samples cover all of them."""
    rng = np.random.default_rng([seed, number, KINDS.index(kind)])

    def of(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    def often(probability: float) -> bool:
        return bool(rng.random() < probability)

    d = HEAD_DIMS[number % len(HEAD_DIMS)]
    dv = of(WIDTHS_OF_V.get(d, (d,)))
    dtype = of(dtypes)
    if dtype == "float8_e4m3fn":
        d = dv = of([64, 128, 192, 256])
    tq, tk = of(sizes)
    mask = of(["full", "causal", "local", "local", "both"])
    window = (-1, -1)
    if mask in ("local", "both"):
        window = tuple(int(x) for x in rng.integers(0, tk, 2))
        window = (of([-1, window[0]]), window[1]) if often(0.2) else window
    options: dict[str, Any] = {
        "causal": mask in ("causal", "both"), "window": window, "chunk": int(rng.integers(1, 2 * tk)) * often(0.2),
        "softcap": of([0.0, 0.0, 15.0, 50.0]), "alibi": of([0, 0, 0, 1, 2]), "sinks": often(0.2),
        "deterministic": often(0.3), "num_splits": of([0, 1, 4]), "given": of([0, 0, 1, 2]),
    }  # fmt: skip
    if kind == "varlen":
        options |= {"lengths": of(["full", "random", "third", "zero"]), "unused": often(0.4)}
    if kind == "cache" or (kind == "varlen" and often(0.4)):
        options["page_size"] = PAGE_SIZES[(number // 2) % len(PAGE_SIZES)]
    if kind == "cache":
        fresh = often(0.6)
        new = of([1, tq, int(rng.integers(1, tq + 1))]) if fresh else 0
        options |= {
            "new": new, "rotary": of([0.0, 0.5, 1.0]), "interleaved": often(0.5),
            "rotary_seqlens": often(0.2), "leftpad": often(0.4), "batch_idx": often(0.5), "varlen_q": often(0.4),
            "metadata": often(0.3),
        }  # fmt: skip
        if not fresh or dtype == "float8_e4m3fn":  # rotary embedding needs 16- or 32-bit rows
            options["rotary"] = 0.0
        tk = max(tk, 2 * tq)
    batch = int(rng.integers(1, 5)) if tq * tk < 1 << 18 else 1
    return Case(kind, batch, (tq, tk), HEADS[of(list(HEADS))], (d, dv), dtype, seed=number, **options)


@dataclass
class _Sequence:
    """One sequence in terms of the formula; `rows` are indices into all rows of q."""

    rows: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


def attend(case: Case, call: dict[str, np.ndarray], number: int, s: _Sequence) -> tuple[np.ndarray, np.ndarray]:
    """out (tq, hq, dv), lse (tq, hq) of sequence `number`, by the formula."""
    tq, tk, (hq, hkv) = len(s.q), len(s.k), case.heads
    if tq == 0:
        return np.zeros((0, hq, case.dims[1])), np.zeros((0, hq))
    factor = {
        name: wide(call[f"{name}_descale"][number]) if f"{name}_descale" in call else np.ones(hkv) for name in "qkv"
    }
    scale = case.dims[0] ** -0.5 if case.scale is None else case.scale
    q = s.q.reshape(tq, hkv, hq // hkv, -1)
    scores = (
        np.einsum("tgnd,sgd->gnts", q, s.k, optimize=True) * (scale * factor["q"] * factor["k"])[:, None, None, None]
    )
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    position, key = np.arange(tq)[:, None] + tk - tq, np.arange(tk)[None]
    distance = position - key
    if case.alibi:
        slopes = wide(call["alibi_slopes"] if case.alibi == 1 else call["alibi_slopes"][number])
        scores = scores - slopes.reshape(hkv, -1, 1, 1) * np.abs(distance)
    keep = np.ones((tq, tk), bool)
    if case.causal:
        keep &= distance >= 0
    if case.window[0] >= 0:
        keep &= distance <= case.window[0]
    if case.window[1] >= 0:
        keep &= -distance <= case.window[1]
    if case.chunk:
        keep &= key // case.chunk == position // case.chunk
    scores = np.where(keep, scores, -np.inf)
    sink = wide(call["sinks"]).reshape(hkv, -1, 1) if case.sinks else np.full((hkv, 1, 1), -np.inf)
    top = np.maximum(scores.max(-1, initial=-np.inf), sink)
    base = np.where(np.isneginf(top), 0, top)
    weights = np.exp(scores - base[..., None])
    total = weights.sum(-1) + np.exp(sink - base)
    v = s.v * factor["v"][:, None]
    out = np.einsum("gnts,sgd->tgnd", weights / np.where(total == 0, 1, total)[..., None], v, optimize=True)
    with np.errstate(divide="ignore"):
        lse = base + np.log(total)
    return out.reshape(tq, hq, -1), lse.transpose(2, 0, 1).reshape(tq, hq)


def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotary embedding of x (t, h, d)."""
    half = cos.shape[1]
    c, s = (wide(table)[positions][:, None] for table in (cos, sin))
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    result = x.copy()
    result[..., first] = x[..., first] * c - x[..., second] * s
    result[..., second] = x[..., first] * s + x[..., second] * c
    return result


def _values(rng: np.random.Generator, case: Case, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(DTYPES[case.dtype])


def _lengths(rng: np.random.Generator, mode: str, longest: int, count: int) -> np.ndarray:
    """flash-attention's padding: full; at most 20 less; from a third on. With zero, some sequences are empty."""
    low = {"full": longest, "third": longest // 3}.get(mode, max(1, longest - 20))
    lengths = rng.integers(min(low, longest), longest + 1, count)
    if mode == "zero":
        lengths[rng.random(count) < 0.4] = 0
    return lengths


def make(case: Case) -> Call:
    rng = np.random.default_rng([case.seed, 99])
    arrays: dict[str, np.ndarray] = {}
    options: dict[str, Any] = {
        **{"causal": case.causal, "window_size": case.window, "softcap": case.softcap, "num_splits": case.num_splits},
        **{"deterministic": case.deterministic, "softmax_scale": case.scale, "return_softmax_lse": True},
    }
    if case.chunk:
        options["attention_chunk"] = case.chunk
    hq, hkv = case.heads
    if case.alibi:
        shape = (hq,) if case.alibi == 1 else (case.batch, hq)
        arrays["alibi_slopes"] = rng.uniform(0.01, 0.3, shape).astype(np.float32)
    if case.sinks:
        arrays["sinks"] = rng.standard_normal(hq).astype(np.float32)
    if case.dtype == "float8_e4m3fn":
        for name in "qkv":
            arrays[f"{name}_descale"] = rng.uniform(0.5, 1.5, (case.batch, hkv)).astype(np.float32)
    build = {"dense": _dense, "varlen": _varlen, "cache": _cache}[case.kind]
    function, sequences, caches = build(rng, case, arrays, options)
    q = arrays["q"]
    rows = int(np.prod(q.shape[:-2]))
    out, lse = np.full((rows, hq, case.dims[1]), UNTOUCHED), np.full((rows, hq), UNTOUCHED)
    used = np.zeros(rows, bool)
    for number, s in enumerate(sequences):
        out[s.rows], lse[s.rows] = attend(case, arrays, number, s)
        used[s.rows] = True
    if case.given:
        dtype = ml_dtypes.bfloat16 if case.dtype == "float8_e4m3fn" else DTYPES[case.dtype]
        arrays["out"] = np.full((*q.shape[:-1], case.dims[1]), UNTOUCHED, dtype)
    if case.given == 2:
        shape = (hq, rows) if q.ndim == 3 else (q.shape[0], hq, q.shape[1])
        arrays["lse"] = np.full(shape, UNTOUCHED, np.float32)
    return Call(case, function, arrays, options, out, lse, used, caches)


def _dense(rng: np.random.Generator, case: Case, arrays: dict, options: dict) -> tuple[str, list[_Sequence], dict]:
    (tq, tk), (hq, hkv), (d, dv) = case.longest, case.heads, case.dims
    arrays["q"] = _values(rng, case, case.batch, tq, hq, d)
    arrays["k"], arrays["v"] = (_values(rng, case, case.batch, tk, hkv, n) for n in (d, dv))
    q, k, v = (wide(arrays[name]) for name in "qkv")
    places = np.arange(case.batch * tq).reshape(case.batch, tq)
    return "flash_attn_func", [_Sequence(*x) for x in zip(places, q, k, v)], {}


def _varlen(rng: np.random.Generator, case: Case, arrays: dict, options: dict) -> tuple[str, list[_Sequence], dict]:
    (tq, tk), (hq, hkv), (d, dv) = case.longest, case.heads, case.dims
    q_lens, k_lens = (_lengths(rng, case.lengths, n, case.batch) for n in (tq, tk))
    q_room, k_room = q_lens, k_lens
    if case.unused:
        q_room, k_room = (n + rng.integers(0, 4, case.batch) for n in (q_lens, k_lens))
        arrays["seqused_q"] = q_lens.astype(np.int32)
    cu_q, cu_k = offsets(q_room), offsets(k_room)
    arrays |= {"q": _values(rng, case, cu_q[-1], hq, d), "cu_seqlens_q": cu_q}
    k, v = (_values(rng, case, cu_k[-1], hkv, n) for n in (d, dv))
    ks, vs = ([x[cu_k[b] : cu_k[b] + k_lens[b]] for b in range(case.batch)] for x in (k, v))
    if case.page_size:
        arrays |= _paged(rng, case, [(int(n), x, y) for n, x, y in zip(k_lens, ks, vs)], "block_table", "k", "v")
        arrays["seqused_k"] = k_lens.astype(np.int32)
        options["cu_seqlens_k"] = None
    else:
        arrays |= {"k": k, "v": v, "cu_seqlens_k": cu_k}
        if case.unused:
            arrays["seqused_k"] = k_lens.astype(np.int32)
    options |= {"max_seqlen_q": int(q_room.max()), "max_seqlen_k": int(k_room.max())}
    places = [np.arange(cu_q[b], cu_q[b] + q_lens[b]) for b in range(case.batch)]
    each = zip(places, [wide(arrays["q"])[p] for p in places], map(wide, ks), map(wide, vs))
    return "flash_attn_varlen_func", [_Sequence(*x) for x in each], {}


def _paged(rng: np.random.Generator, case: Case, rows: list, table: str, k: str, v: str) -> dict[str, np.ndarray]:
    """Shuffled pages of rows [(room, keys, values)]; NaN in all other slots, no page after a row's last."""
    size = case.page_size
    counts = [-(-room // size) for room, _, _ in rows]
    order = rng.permutation(sum(counts) + 2)
    caches = [
        np.full((len(order), size, case.heads[1], n), np.nan, np.float32).astype(DTYPES[case.dtype]) for n in case.dims
    ]
    numbers = np.full((len(rows), max(*counts, 1)), 2**30, np.int32)
    first = 0
    for row, (count, (_, *parts)) in enumerate(zip(counts, rows)):
        numbers[row, :count] = order[first : first + count]
        for cache, part in zip(caches, parts):
            at = numbers[row, np.arange(len(part)) // size] if len(part) else np.zeros(0, int)
            cache[at, np.arange(len(part)) % size] = part
        first += count
    return {k: caches[0], v: caches[1], table: numbers}


def _cache(rng: np.random.Generator, case: Case, arrays: dict, options: dict) -> tuple[str, list[_Sequence], dict]:
    (tq, tk), (hq, hkv), (d, dv) = case.longest, case.heads, case.dims
    b = case.batch
    q_lens = _lengths(rng, "random", tq, b) if case.varlen_q else np.full(b, tq)
    new = np.full(b, case.new)
    if case.varlen_q and case.new:
        new = _lengths(rng, "random", case.new, b)
    used = rng.integers(0 if case.new else 1, tk - (max(tq, case.new) if case.new else 0) + 1, b)
    pad = np.array([rng.integers(0, n) if case.leftpad and n else 0 for n in used])
    if case.varlen_q:
        arrays |= {"q": _values(rng, case, int(q_lens.sum()), hq, d), "cu_seqlens_q": offsets(q_lens)}
        options["max_seqlen_q"] = int(tq)
    else:
        arrays["q"] = _values(rng, case, b, tq, hq, d)
    places = np.split(np.arange(int(q_lens.sum())), np.cumsum(q_lens)[:-1])
    qs = [wide(arrays["q"].reshape(-1, hq, d)[p]) for p in places]
    ks, vs = ([_values(rng, case, int(n), hkv, width) for n in used] for width in (d, dv))
    fresh = [[_values(rng, case, int(n), hkv, width) for n in new] for width in (d, dv)]
    arrays["cache_seqlens"] = used.astype(np.int32)
    if case.leftpad:
        arrays["cache_leftpad"] = pad.astype(np.int32)
    if case.new:
        join = np.concatenate if case.varlen_q else np.stack
        arrays |= {"k": join(fresh[0]), "v": join(fresh[1])}
        if case.varlen_q:
            arrays["cu_seqlens_k_new"] = offsets(new)
    turned, new_keys = _turned(rng, case, arrays, options, (qs, fresh[0]), used)
    full_k = [np.concatenate(x) for x in zip(ks, [x.astype(ks[0].dtype) for x in new_keys])]
    full_v = [np.concatenate(x) for x in zip(vs, fresh[1])]
    caches = _store(rng, case, arrays, [(ks, vs), (full_k, full_v)])
    if case.metadata:
        options["scheduler_metadata"] = {"lengths": (used + new).astype(np.int32), "longest": int(tk)}
    each = zip(places, turned, [wide(x[p:]) for x, p in zip(full_k, pad)], [wide(x[p:]) for x, p in zip(full_v, pad)])
    return "flash_attn_with_kvcache", [_Sequence(*x) for x in each], caches


def _turned(rng: np.random.Generator, case: Case, arrays: dict, options: dict, rows: tuple, used: np.ndarray) -> tuple:
    """q and the new keys after rotary embedding, at cache_seqlens + i; without a mask all queries have the same
    position."""
    width = int(case.rotary * case.dims[0]) // 16 * 16
    qs, keys = rows
    if not case.new or width == 0:
        return qs, [wide(x) for x in keys]
    angle = rng.uniform(0, 2 * np.pi, (case.longest[1] + case.longest[0], width // 2))
    kind = np.float32 if case.dtype == "float8_e4m3fn" else DTYPES[case.dtype]
    cos, sin = (f(angle).astype(kind) for f in (np.cos, np.sin))
    arrays |= {"rotary_cos": cos, "rotary_sin": sin}
    options["rotary_interleaved"] = case.interleaved
    start = used // 2 if case.rotary_seqlens else used
    if case.rotary_seqlens:
        arrays["rotary_seqlens"] = start.astype(np.int32)
    each_row = case.causal or max(case.window) >= 0 or case.chunk > 0
    step = 1 if each_row else 0
    dtype = DTYPES[case.dtype]
    spin = lambda x, first, step: turn(x, cos, sin, first + step * np.arange(len(x)), case.interleaved)  # noqa: E731
    turned = [wide(spin(x, n, step).astype(dtype)) for x, n in zip(qs, start)]
    return turned, [spin(wide(x), n, 1) for x, n in zip(keys, start)]


def _store(rng: np.random.Generator, case: Case, arrays: dict, states: list) -> dict[str, np.ndarray]:
    """Stores the keys and values from before the call in `arrays`; returns the expected caches after it."""
    b, (_, tk) = case.batch, case.longest
    order = rng.permutation(2 * b)[:b] if case.batch_idx else np.arange(b)
    if case.batch_idx:
        arrays["cache_batch_idx"] = order.astype(np.int32)
    place = np.full(2 * b if case.batch_idx else b, -1)
    place[order] = np.arange(b)
    empty = [np.zeros((0, case.heads[1], n), DTYPES[case.dtype]) for n in case.dims]
    bits, results = rng.bit_generator.state, []
    for ks, vs in states:  # the same pages for both
        rng.bit_generator.state = bits
        rows = [(tk, *((ks[n], vs[n]) if n >= 0 else empty)) for n in place]
        if case.page_size:
            results.append(_paged(rng, case, rows, "block_table", "k_cache", "v_cache"))
            continue
        dense = [
            np.full((len(rows), tk, case.heads[1], n), np.nan, np.float32).astype(DTYPES[case.dtype]) for n in case.dims
        ]
        for row, (_, *parts) in enumerate(rows):
            for cache, part in zip(dense, parts):
                cache[row, : len(part)] = part
        results.append({"k_cache": dense[0], "v_cache": dense[1]})
    arrays |= results[0]
    return {name: wide(results[1][name]) for name in ("k_cache", "v_cache")} if case.new else {}


def compare(call: Call, out: np.ndarray, lse: np.ndarray, caches: dict[str, np.ndarray]) -> None:
    """Asserts the rows in use, that no other row of the caller's was written, and every slot of the caches."""
    case, heads = call.case, call.case.heads[0]
    dtype = "bfloat16" if case.dtype == "float8_e4m3fn" else case.dtype
    lse = lse.T if lse.ndim == 2 else lse.transpose(0, 2, 1).reshape(-1, heads)
    out = out.reshape(-1, *out.shape[-2:])
    rows = [slice(None) if case.given >= least else call.rows for least in (1, 2)]
    close(wide(out)[rows[0]], call.out[rows[0]], dtype=dtype)
    close(lse[rows[1]], call.lse[rows[1]], dtype="float32" if dtype == "float32" else "float16", what="lse")
    for name, want in call.caches.items():
        got = wide(caches[name])
        assert (np.isnan(got) == np.isnan(want)).all(), (
            f"{name}: slots written that are nobody's, or none where one should"
        )
        close(np.nan_to_num(got), np.nan_to_num(want), dtype=case.dtype, what=name)
