"""Attention by the formula, in NumPy float64, one sequence at a time. Shares no code with the library."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def wide(x):
    """Any float array as float64, in which bfloat16 and fp8 values are exact."""
    return None if x is None else np.asarray(x).astype(np.float64)


@dataclass
class Options:
    """Arguments of one sequence beyond q, k, v, in the library's format but without the sequence axis."""

    softmax_scale: float | None = None
    causal: bool = False
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    sinks: np.ndarray | None = None  # (num_heads,)
    alibi_slopes: np.ndarray | None = None  # (num_heads,)
    rel_logits: np.ndarray | None = None  # (seqlen_q, num_heads, extent)
    ranges: list | None = None  # [(first, last)] for the sequence
    query_ranges: np.ndarray | None = None  # (seqlen_q, 2)
    clamp: bool = False
    prefix_len: int = 0
    rswa_window: int = 0
    q_descale: np.ndarray | float = 1.0  # (num_heads_kv,)
    k_descale: np.ndarray | float = 1.0
    v_descale: np.ndarray | float = 1.0
    leftpad: int = 0
    dropout_p: float = 0.0
    dropped: np.ndarray | None = None  # (num_heads, seqlen_q, seqlen_k), left padding included


def keep_mask(tq: int, tk: int, o: Options) -> np.ndarray:
    """(tq, tk) booleans: the keys that each query sees."""
    keep = np.zeros((tq, tk), bool)
    for i in range(tq):
        position = i + tk - tq
        for j in range(tk):
            if o.rswa_window > 0:
                keep[i, j] = j <= position and (j < o.prefix_len or position - j < o.rswa_window)
                continue
            seen = not (o.causal and j > position)
            seen = seen and not (o.left >= 0 and position - j > o.left)
            seen = seen and not (o.right >= 0 and j - position > o.right)
            ranges = list(o.ranges or [])
            if o.query_ranges is not None:
                ranges.append(tuple(o.query_ranges[i]))
            for first, last in ranges:
                if 0 <= first <= position <= last and first <= j <= last:
                    clamped = o.clamp and o.left >= 0 and position - j > o.left
                    seen = seen or not clamped
            keep[i, j] = seen
    return keep


def attend_one(q, k, v, o: Options) -> tuple[np.ndarray, np.ndarray]:
    """q (tq, hq, d), k (tk, hkv, d), v (tk, hkv, dv) -> out (tq, hq, dv), lse (hq, tq)."""
    q, k, v = wide(q), wide(k)[o.leftpad :], wide(v)[o.leftpad :]
    tq, hq, d = q.shape
    tk, hkv, dv = v.shape
    scale = 1 / math.sqrt(d) if o.softmax_scale is None else o.softmax_scale
    out, lse = np.zeros((tq, hq, dv)), np.full((hq, tq), -np.inf)
    keep = keep_mask(tq, tk, o)
    position = np.arange(tq)[:, None] + tk - tq
    distance = position - np.arange(tk)[None, :]
    for h in range(hq):
        g = h // (hq // hkv)
        descale = [np.broadcast_to(wide(x), (hkv,))[g] for x in (o.q_descale, o.k_descale, o.v_descale)]
        s = q[:, h] @ k[:, g].T * scale * descale[0] * descale[1]
        if o.softcap > 0:
            s = o.softcap * np.tanh(s / o.softcap)
        if o.rel_logits is not None:
            extent = o.rel_logits.shape[-1]
            inside = (distance >= 0) & (distance < extent)
            bias = wide(o.rel_logits)[:, h]
            s = s + np.where(inside, np.take_along_axis(bias, np.clip(distance, 0, extent - 1), axis=1), 0.0)
        if o.alibi_slopes is not None:
            s = s - float(o.alibi_slopes[h]) * np.abs(distance)
        s = np.where(keep, s, -np.inf)
        sink = float(wide(o.sinks)[h]) if o.sinks is not None else -np.inf
        for i in range(tq):
            top = max(s[i].max(initial=-np.inf), sink)
            if top == -np.inf:
                continue
            p = np.exp(s[i] - top)
            total = p.sum() + np.exp(sink - top)
            lse[h, i] = top + math.log(total)
            if o.dropped is not None:
                p = np.where(o.dropped[h, i, o.leftpad :], 0, p / (1 - o.dropout_p))
            out[i, h] = (p / total) @ v[:, g] * descale[2]
    return out, lse


def attend_dense(q, k, v, options: Options | list[Options] | None = None):
    """q (b, tq, hq, d), k, v (b, tk, hkv, ..) -> out (b, tq, hq, dv), lse (b, hq, tq)."""
    options = options or Options()
    each = options if isinstance(options, list) else [options] * len(q)
    results = [attend_one(q[b], k[b], v[b], each[b]) for b in range(len(q))]
    return np.stack([r[0] for r in results]), np.stack([r[1] for r in results])


def attend_varlen(q, ks, vs, cu_seqlens_q, options: Options | list[Options] | None = None):
    """q (total_q, hq, d); ks, vs one array a sequence -> out (total_q, hq, dv), lse (hq, total_q)."""
    options = options or Options()
    each = options if isinstance(options, list) else [options] * len(ks)
    out, lse = np.zeros((len(q), q.shape[1], vs[0].shape[-1])), np.full((q.shape[1], len(q)), -np.inf)
    for b, (k, v) in enumerate(zip(ks, vs, strict=True)):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        out[rows], lse[:, rows] = attend_one(q[rows], k, v, each[b])
    return out, lse


def rotate(x, cos, sin, positions, interleaved: bool):
    """Rotary embedding of x (t, h, d) at `positions` (t,); cos, sin (p, rotary_dim / 2)."""
    x = wide(x).copy()
    half = cos.shape[1]
    for i, p in enumerate(positions):
        for n in range(half):
            a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + half)
            c, s = float(cos[p, n]), float(sin[p, n])
            x0, x1 = x[i, :, a].copy(), x[i, :, b].copy()
            x[i, :, a], x[i, :, b] = x0 * c - x1 * s, x0 * s + x1 * c
    return x


# (absolute, relative) error bounds against float64: rounding of the result, and float32 arithmetic in the engine, with
# 16-bit probabilities for 16-bit values.
BOUNDS = {"float32": (2e-5, 2e-5), "float16": (2e-3, 2e-3), "bfloat16": (1e-2, 1e-2), "float8_e4m3fn": (1e-1, 7e-2)}


def close(got, want, dtype=None, what="out") -> None:
    """Asserts equal infinities and NaNs, and a bounded error elsewhere."""
    got_wide, want = wide(got), np.asarray(want)
    assert got_wide.shape == want.shape, f"{what}: shape {got_wide.shape} is not {want.shape}"
    assert not np.isnan(got_wide).any(), f"{what}: {np.isnan(got_wide).sum()} NaN"
    finite = np.isfinite(want)
    assert (np.isfinite(got_wide) == finite).all(), f"{what}: infinities differ"
    assert (got_wide[~finite] == want[~finite]).all(), f"{what}: infinities differ in sign"
    absolute, relative = BOUNDS[str(dtype or np.asarray(got).dtype)]
    error = np.abs(np.where(finite, got_wide, 0) - np.where(finite, want, 0))
    bound = absolute + relative * np.abs(np.where(finite, want, 0))
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else None
    assert worst is None or (error <= bound).all(), f"{what}{list(worst)}: {got_wide[worst]} is not {want[worst]}"
