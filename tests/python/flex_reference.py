"""Attention with functions of scores and positions, by the formula, in NumPy float64. Shares no code with the library.

Functions take NumPy arrays by broadcasting. Layout: (B, H, tokens, D), as flex_attention's.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np


def places(*sizes):
    """b, h, q_idx and kv_idx as int32 arrays that broadcast."""
    return np.ix_(*(np.arange(n, dtype=np.int32) for n in sizes))


def kept_by(mask_mod, *sizes):
    """bool (B, H, Q, K) of a mask function; None keeps all."""
    if mask_mod is None:
        return np.ones(sizes, bool)
    with np.errstate(all="ignore"):
        return np.broadcast_to(mask_mod(*places(*sizes)), sizes)


def kept_by_lists(kinds, size, mask_mod, *sizes):
    """bool (B, H, Q, K). kinds: (B or 1, H or 1, blocks, blocks): 0 not listed, 1 asks mask_mod, 2 keeps all."""
    batch, heads, rows, keys = sizes
    wide = np.repeat(np.repeat(kinds, size[0], 2), size[1], 3)[:, :, :rows, :keys]
    wide = np.broadcast_to(wide, (batch, heads, rows, keys))
    return (wide == 2) | ((wide == 1) & kept_by(mask_mod, *sizes))


def lists_of(rng, kinds, kind, dtype=np.int32):
    """(counts, indices) of the blocks of one kind, in any order; what lies past a count is out of range."""
    wanted = kinds == kind
    counts = wanted.sum(-1).astype(dtype)
    indices = np.full(kinds.shape, 2**30, dtype)
    for place in np.ndindex(kinds.shape[:3]):
        found = rng.permutation(np.flatnonzero(wanted[place]))
        indices[(*place, slice(0, len(found)))] = found
    return counts, indices


def attend(q, k, v, score_mod=None, keep=None, scale=None, through=None, sinks=None):
    """out (B, H, Q, Dv) and lse (B, H, Q) in float64.

    keep: bool (B, H, Q, K). through: a type that scores, probabilities and the result are rounded to, as an
    implementation that writes them to memory does. sinks: (H,) logits that enter the denominator only.
    """
    rounded = (lambda x: x) if through is None else (lambda x: x.astype(through).astype(np.float64))
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    batch, heads = q.shape[:2]
    k, v = (np.repeat(np.broadcast_to(x, (batch, *x.shape[1:])), heads // x.shape[1], 1) for x in (k, v))
    s = rounded(q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale))
    with np.errstate(all="ignore"):
        if score_mod is not None:
            s = rounded(np.broadcast_to(score_mod(s, *places(*s.shape)), s.shape).astype(np.float64))
        if keep is not None:
            s = np.where(keep, s, -np.inf)
        sink = -np.inf if sinks is None else np.asarray(sinks).astype(np.float64)[:, None, None]
        top = np.maximum(s.max(-1, initial=-np.inf, keepdims=True), sink)
        finite = np.where(np.isfinite(top), top, 0)
        p = np.exp(s - finite)
        total = p.sum(-1, keepdims=True) + np.exp(sink - finite)
        out = rounded(rounded(p / np.where(total > 0, total, 1)) @ v)
        return out, (np.log(total) + finite)[..., 0]


def check(got, q, k, v, score_mod=None, keep=None, scale=None, lse=None, sinks=None):
    """Asserts that a result is as near to float64 as one that rounds between the steps, within a factor of 2."""
    got_wide = np.asarray(got).astype(np.float64)
    want, want_lse = attend(q, k, v, score_mod, keep, scale, sinks=sinks)
    assert got_wide.shape == want.shape
    dtype = np.asarray(q).dtype
    bound = 2e-5
    if dtype in (np.float16, ml_dtypes.bfloat16):
        bound = 2 * np.abs(attend(q, k, v, score_mod, keep, scale, dtype, sinks)[0] - want).max(initial=0) + 1e-5
    error = np.abs(got_wide - want)
    assert not np.isnan(error).any() and error.max(initial=0) <= bound, f"{error.max()} is more than {bound}"
    if lse is not None:
        lse = np.asarray(lse).astype(np.float64)
        assert lse.shape == want_lse.shape and (np.isfinite(lse) == np.isfinite(want_lse)).all()
        finite = np.isfinite(want_lse)
        error = np.abs(np.where(finite, lse, 0) - np.where(finite, want_lse, 0))
        assert (error <= (2e-5 if dtype == np.float32 else 2e-3) * (1 + np.abs(np.where(finite, want_lse, 0)))).all()
        assert (lse[~finite] == want_lse[~finite]).all()


def counted(monkeypatch, module, name):
    """Replaces a function of a module by one that calls it; the list grows by the arguments of each call."""
    calls = []
    original = getattr(module, name)

    def call(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(module, name, call)
    return calls
