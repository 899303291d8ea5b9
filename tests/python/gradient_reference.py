"""Attention by the formula in torch, of any precision, so that torch's autograd gives the gradients. Shares no code
with the library.

In float64 it is the reference; in a narrow type every operation rounds to that type, as torch's own math attention
does, and its error is what ours is measured by.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from reference import Options, keep_mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: Options | None = None,
    keep: torch.Tensor | None = None,
    score: Callable[..., torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q (tq, hq, d), k (tk, hkv, d), v (tk, hkv, dv) -> out (tq, hq, dv), lse (hq, tq).

    o: as in reference.py, with tensors in place of sinks, alibi_slopes and rel_logits. keep: bool, broadcasts to (hq,
    tq, tk), beside o's own mask. score: a function of (score, head, query, key), which broadcast to that shape.
    """
    o = o or Options()
    (tq, hq, d), tk, dtype = q.shape, len(k), q.dtype
    k, v = (x.repeat_interleave(hq // x.shape[1], 1) for x in (k, v))
    scale = 1 / math.sqrt(d) if o.softmax_scale is None else o.softmax_scale
    s = torch.einsum("thd,shd->hts", q * scale, k)
    heads, rows, keys = (torch.arange(n).view(shape) for n, shape in ((hq, (-1, 1, 1)), (tq, (-1, 1)), (tk, (-1,))))
    distance = rows + tk - tq - keys
    if o.softcap > 0:
        s = o.softcap * torch.tanh(s / o.softcap)
    if o.rel_logits is not None:
        extent = o.rel_logits.shape[-1]
        bias = torch.gather(o.rel_logits.to(dtype).transpose(0, 1), 2, distance.clamp(0, extent - 1).expand(hq, -1, -1))
        s = s + torch.where((distance >= 0) & (distance < extent), bias, torch.zeros((), dtype=dtype))
    if o.alibi_slopes is not None:
        s = s - o.alibi_slopes.to(dtype)[:, None, None] * distance.abs()
    if score is not None:
        s = score(s, heads, rows, keys).to(dtype)
    seen = torch.from_numpy(keep_mask(tq, tk, o)) if o != Options() else torch.ones(tq, tk, dtype=torch.bool)
    seen = (seen if keep is None else seen & keep).expand(hq, tq, tk)
    s = s.masked_fill(~seen, -math.inf)
    if o.sinks is not None:
        s = torch.cat([s, o.sinks.to(dtype)[:, None, None].expand(hq, tq, 1)], -1)
    elif tk == 0:
        nothing = 0 * (q.sum() + k.sum() + v.sum())  # so that there are gradients, of 0
        return v.new_zeros(tq, hq, v.shape[-1]) + nothing, s.new_full((hq, tq), -math.inf) + nothing
    empty = (s == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    lse = torch.logsumexp(s.masked_fill(empty, 0), -1).masked_fill(empty[..., 0], -math.inf)
    p = p[..., :tk]
    if o.dropped is not None:
        p = p.masked_fill(torch.from_numpy(np.asarray(o.dropped)), 0) / (1 - o.dropout_p)
    return torch.einsum("hts,shd->thd", p.to(dtype), v), lse


def weighted(out: torch.Tensor, lse: torch.Tensor | None, seed: int = 7) -> torch.Tensor:
    """A loss that depends on every element: the sum with fixed random weights. lse may hold -inf."""
    generator = torch.Generator().manual_seed(seed)
    total = (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    if lse is None:
        return total
    weights = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    return total + (lse.double().masked_fill(lse == -math.inf, 0) * weights).sum()


def assert_within(got: torch.Tensor, want: torch.Tensor, narrow: torch.Tensor, what: str, factor: float = 2.0) -> None:
    """The bound: at most `factor` times the error of torch's arithmetic in that type, and 1e-5 of the largest.

    want: float64. narrow: the same gradient by torch's own arithmetic.
    """
    assert got is not None, f"{what}: no gradient"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} is not {tuple(want.shape)}"
    assert got.isfinite().all(), f"{what}: not finite"
    if want.numel() == 0:
        return
    error, theirs = ((x.double() - want).abs().max().item() for x in (got, narrow))
    bound = factor * theirs + 1e-5 * want.abs().max().item()
    assert error <= bound, f"{what}: error {error:.3g}, torch's {theirs:.3g}, largest {want.abs().max().item():.3g}"
