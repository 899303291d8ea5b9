"""Attention in float64 from the formula in flashspark.h, and the error of torch's own 16-bit arithmetic.

Sequences of similar lengths are padded to one batch, so that a serving batch takes a few dozen launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from problem import Problem

FREE_PADDING = 1 << 22  # padding that a group may have whatever its size
KEY_COST = 64  # cost of one key's copy, in units of one score
MOST_NUMBERS = 1 << 28  # 2 GiB of float64; several tensors of that size are alive at once
INFINITY = float("inf")


@dataclass
class Answer:
    """Results of the query rows in use, in the order of the sequences, without padding. lse: (rows, Hq)."""

    rows: torch.Tensor  # flat indices of those rows
    exact: torch.Tensor
    exact_lse: torch.Tensor
    rounded: torch.Tensor
    rounded_lse: torch.Tensor


def groups(q_len: np.ndarray, k_len: np.ndarray) -> list[np.ndarray]:
    """Groups the sequences that have queries, so that padding to the longest of a group wastes little."""
    order = [int(b) for b in np.lexsort((k_len, q_len))[::-1] if q_len[b] > 0]
    result: list[list[int]] = []
    tq = tk = real = 0
    for b in order:
        cost = int((q_len[b] + KEY_COST) * max(k_len[b], 1))
        wide_q, wide_k = max(tq, int(q_len[b])), max(tk, int(k_len[b]), 1)
        padded = (wide_q + KEY_COST) * wide_k * (len(result[-1]) + 1) if result else 0
        if not result or padded > max(2 * (real + cost), FREE_PADDING):
            result.append([])
            wide_q, wide_k, real = int(q_len[b]), max(int(k_len[b]), 1), 0
        result[-1].append(b)
        tq, tk, real = wide_q, wide_k, real + cost
    return [np.array(g) for g in result]


def in_memory(whole: list[np.ndarray], numbers: np.ndarray, p: Problem) -> list[np.ndarray]:
    """Splits the groups so that scores and copies of keys stay below MOST_NUMBERS where a group has several
    sequences."""
    key = p.k.shape[-2] * (p.k.shape[-1] + p.v.shape[-1])
    parts = []
    for members in whole:
        tq, tk = int(numbers[1][members].max()), max(int(numbers[3][members].max()), 1)
        each = tk * max(p.q.shape[-2] * tq, key)
        parts += np.array_split(members, min(len(members), -(-len(members) * each // MOST_NUMBERS)))
    return parts


@dataclass
class Group:
    """Indices of one padded group, on the device."""

    index: torch.Tensor  # (G,) sequence numbers
    rows: torch.Tensor  # (G, Tq) flat query rows; padding refers to one row past the last
    q_at: tuple[torch.Tensor, torch.Tensor]
    k_at: tuple[torch.Tensor, torch.Tensor]
    keep: torch.Tensor  # (G, Tq, Tk)
    distance: torch.Tensor  # (G, Tq, Tk): position of the query minus that of the key


def as_4d(x: torch.Tensor) -> torch.Tensor:
    return x if x.ndim == 4 else x[None]


def group(p: Problem, members: np.ndarray, longest: tuple[int, int], sequences: torch.Tensor) -> Group:
    device = p.q.device
    index = torch.from_numpy(members).to(device)
    q_row, q_len, k_row, k_len, causal = (x[:, None] for x in sequences[:, index])
    i, j = (torch.arange(n, device=device)[None] for n in longest)
    has_row, has_key = i < q_len, j < k_len

    varlen_q = p.q.ndim == 3
    total = p.q.shape[0] if varlen_q else p.q.shape[0] * p.q.shape[1]
    inner_q = torch.where(has_row, q_row + i, 0)
    outer_q = torch.zeros_like(inner_q) if varlen_q else index[:, None].expand_as(inner_q)
    flat = inner_q if varlen_q else outer_q * p.q.shape[1] + inner_q
    rows = torch.where(has_row, flat, total)

    token = torch.where(has_key, k_row + j, 0)
    table = p.device.get("page_table")
    if table is not None:
        size = p.k.shape[1]
        slot = (token // size).clamp(max=table.shape[1] - 1)
        own = p.device["kv_batch_index"][index].long() if "kv_batch_index" in p.device else index
        outer_k = torch.where(has_key, table[own].gather(1, slot).long(), 0)
        k_at = (outer_k, token % size)
    elif p.k.ndim == 3:
        k_at = (torch.zeros_like(token), token)
    else:
        batch = p.device["kv_batch_index"][index].long() if "kv_batch_index" in p.device else index
        k_at = (batch[:, None].expand_as(token), token)

    position = i + k_len - q_len
    distance = position[:, :, None] - j[:, None, :]
    keep = _keep(p, index, rows, position, j, distance, causal)
    keep &= has_row[:, :, None] & has_key[:, None, :]
    return Group(index, rows, (outer_q, inner_q), k_at, keep, distance)


def _keep(
    p: Problem,
    index: torch.Tensor,
    rows: torch.Tensor,
    position: torch.Tensor,
    j: torch.Tensor,
    distance: torch.Tensor,
    causal: torch.Tensor,
) -> torch.Tensor:
    spec, key = p.spec, j[:, None, :]
    if spec.rswa:
        prefix = p.device["rswa_prefix_lens"][index].long()[:, None, None]
        return (distance >= 0) & ((key < prefix) | (distance < spec.rswa))
    left, right = spec.window
    in_left = distance <= left if left >= 0 else torch.ones_like(distance, dtype=torch.bool)
    keep = in_left & ((distance >= 0) | (causal[:, :, None] == 0))
    if spec.chunk:
        keep &= position[:, :, None].div(spec.chunk, rounding_mode="floor") == key.div(
            spec.chunk, rounding_mode="floor"
        )
    if right >= 0:
        keep &= -distance <= right
    if not spec.prefix:
        return keep
    ranges = p.device["prefix_ranges"].long()
    if spec.prefix == "per_token":
        own = ranges[rows.clamp(max=len(ranges) - 1)]  # (G, Tq, 2)
        wider = (key >= own[:, :, :1]) & (key <= own[:, :, 1:])
    else:
        wider = torch.zeros_like(keep)
        for r in range(ranges.shape[1]):
            first, last = ranges[index, r, 0][:, None], ranges[index, r, 1][:, None]
            holds = (position >= first) & (position <= last)
            inside = (j >= first) & (j <= last)
            wider |= holds[:, :, None] & inside[:, None, :]
    return keep | (wider & in_left if spec.clamp else wider)


def _scores(p: Problem, g: Group, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scores (G, Hkv, group, Tq, Tk) in the dtype of q and k, masked with -inf."""
    spec, (count, tq, hq, dim), hkv = p.spec, q.shape, k.shape[2]
    packed = q.transpose(1, 2).reshape(count, hkv, hq // hkv * tq, dim)
    s = packed @ k.permute(0, 2, 3, 1)
    s = s.view(count, hkv, hq // hkv, tq, -1)
    s *= p.options.get("softmax_scale", 1 / np.sqrt(dim))
    for name in ("q_descale", "k_descale") if spec.fp8 == "qkv" else ("k_descale",):
        if name in p.options:
            s *= p.options[name][g.index].to(s.dtype)[:, :, None, None, None]
    if spec.softcap:
        s = torch.tanh_(s.div_(spec.softcap)).mul_(spec.softcap)
    if spec.rel_extent:
        table = as_4d(p.options["rel_logits"])[g.q_at].to(s.dtype)  # (G, Tq, Hq, extent)
        table = table.transpose(1, 2).reshape(count, hkv, hq // hkv, tq, -1)
        at = g.distance.clamp(0, spec.rel_extent - 1)[:, None, None].expand_as(s)
        inside = (g.distance >= 0) & (g.distance < spec.rel_extent)
        s += torch.where(inside[:, None, None], table.gather(-1, at), 0)
    if spec.alibi:
        slopes = p.options["alibi_slopes"].to(s.dtype)
        slopes = slopes[g.index] if slopes.ndim == 2 else slopes[None]
        s -= slopes.view(-1, hkv, hq // hkv, 1, 1) * g.distance.abs()[:, None, None].to(s.dtype)
    return s.masked_fill_(~g.keep[:, None, None], -INFINITY)


def _attend(
    p: Problem, g: Group, kept: torch.Tensor, dtype: torch.dtype, round_to: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (G, Tq, Hq, Dv) and lse (G, Tq, Hq), summed in `dtype` with probabilities rounded to `round_to`."""
    q = as_4d(p.q)[g.q_at].to(dtype)
    # Unused K and V are poisoned with NaN, and 0 * NaN is NaN: replace them by zeros. A cache may have no row at all.
    k, v = (
        as_4d(x)[g.k_at].to(dtype).masked_fill_(~kept[..., None, None], 0)
        if x.numel() > 0
        else torch.zeros(*kept.shape, *x.shape[-2:], dtype=dtype, device=x.device)
        for x in (p.k, p.v)
    )
    s = _scores(p, g, q.nan_to_num(), k)
    count, hkv, packed, tq, tk = s.shape
    top = s.amax(-1, keepdim=True)
    sink = None
    if "sinks" in p.options:
        sink = p.options["sinks"].to(dtype).view(1, hkv, packed, 1, 1)
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -INFINITY, 0)
    weights = s.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    if round_to is not None:
        weights = weights.to(round_to).to(dtype)
    out = weights.view(count, hkv, packed * tq, tk) @ v.transpose(1, 2)
    out = out.view(count, hkv, packed, tq, -1) / total.masked_fill(total == 0, 1)
    if "v_descale" in p.options:
        out = out * p.options["v_descale"][g.index].to(dtype)[:, :, None, None, None]
    lse = top + total.log()

    def rows_first(x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2, 4).reshape(count, tq, hkv * packed, -1)

    return rows_first(out), rows_first(lse)[..., 0]


def stored(p: Problem, out: torch.Tensor) -> torch.Tensor:
    """A float32 result rounded to the dtype of out."""
    if not p.spec.e4m3_out:
        return out.to(p.q.dtype).float()
    scale = p.options["output_scale"]
    return (out / scale).to(torch.float8_e4m3fn).float() * scale


def attend(p: Problem) -> Answer:
    numbers = p.sequences()
    sequences = torch.from_numpy(numbers).to(p.q.device)
    heads, dim_v = p.q.shape[-2], p.v.shape[-1]
    stride = 0 if p.q.ndim == 3 else p.q.shape[1]
    used = [b * stride + first + np.arange(count) for b, (first, count) in enumerate(numbers[:2].T)]
    rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *used])).to(p.q.device)
    index = rows.new_full((p.q.shape[:-2].numel() + 1,), len(rows))
    index[rows] = torch.arange(len(rows), device=p.q.device)

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        # One extra row receives the padding.
        return torch.full((len(rows) + 1, *shape), float("nan"), dtype=dtype, device=p.q.device)

    exact, exact_lse = empty(torch.float64, heads, dim_v), empty(torch.float64, heads)
    rounded, rounded_lse = empty(torch.float32, heads, dim_v), empty(torch.float32, heads)
    for members in in_memory(groups(numbers[1], numbers[3]), numbers, p):
        longest = (int(numbers[1][members].max()), max(int(numbers[3][members].max()), 1))
        g = group(p, members, longest, sequences)
        kept = g.keep.any(1)
        for dtype, round_to, out, lse in (
            (torch.float64, None, exact, exact_lse),
            (torch.float32, p.q.dtype, rounded, rounded_lse),
        ):
            o, logsum = _attend(p, g, kept, dtype, round_to)
            at = index[g.rows.flatten()]
            out.index_copy_(0, at, (o if round_to is None else stored(p, o)).flatten(0, 1))
            lse.index_copy_(0, at, logsum.flatten(0, 1))
    return Answer(rows, exact[:-1], exact_lse[:-1], rounded[:-1], rounded_lse[:-1])


def poison_unseen(p: Problem) -> None:
    """Sets every key and value that no query sees to NaN: unused pages, tail slots, keys outside every window."""
    numbers = p.sequences()
    sequences = torch.from_numpy(numbers).to(p.q.device)
    outer, inner = as_4d(p.k).shape[:2]
    seen = torch.zeros(outer * inner + 1, dtype=torch.bool, device=p.q.device)
    for members in groups(numbers[1], numbers[3]):
        longest = (int(numbers[1][members].max()), max(int(numbers[3][members].max()), 1))
        g = group(p, members, longest, sequences)
        if p.spec.poison_unkept:
            used = g.keep.any(1)
        else:
            used = torch.arange(longest[1], device=p.q.device)[None] < sequences[3, g.index][:, None]
        at = g.k_at[0] * inner + g.k_at[1]
        seen[torch.where(used, at, outer * inner).flatten()] = True
    unseen = ~seen[:-1].view(outer, inner, 1, 1)
    for x in (p.k, p.v):
        as_4d(x).masked_fill_(unseen, float("nan"))


def _metrics(got: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    got, rounded = got.double(), rounded.double()
    if got.numel() == 0:
        return torch.zeros(6, dtype=torch.float64, device=got.device)
    differ = (got.isnan() != exact.isnan()) | ((got.isinf() | exact.isinf()) & (got != exact))
    counted = exact.isfinite() & got.isfinite()
    ours, theirs = ((x - exact).abs().where(counted, 0.0) for x in (got, rounded))
    count = counted.sum().clamp(min=1)
    means = [(x.square().sum() / count).sqrt() for x in (ours, theirs)]
    largest = exact.abs().where(counted, 0.0).max()
    return torch.stack([differ.sum().double(), ours.max(), theirs.max(), *means, largest])


def failures(p: Problem, out: torch.Tensor, lse: torch.Tensor | None, answer: Answer | None = None) -> list[str]:
    """Violations of the accuracy rule: errors at most twice those of torch's 16-bit arithmetic + 1e-5; NaN and -inf in
    place."""
    answer = answer or attend(p)
    if p.spec.e4m3_out:
        out = out.float() * p.options["output_scale"]
    compared = {"out": (out.reshape(-1, *out.shape[-2:]), answer.exact, answer.rounded)}
    if lse is not None:
        rows = lse.T if lse.ndim == 2 else lse.transpose(1, 2).reshape(-1, lse.shape[1])
        compared["lse"] = (rows, answer.exact_lse, answer.rounded_lse)
    unused = torch.ones(p.q.shape[:-2].numel(), dtype=torch.bool, device=p.q.device)
    unused[answer.rows] = False
    numbers = torch.stack(
        [
            torch.cat([_metrics(got[answer.rows], *wanted), (~got.isnan()).flatten(1).any(1)[unused].sum()[None]])
            for got, *wanted in compared.values()
        ]
    ).tolist()  # the only synchronisation of a case
    found = []
    for name, (differ, ours, theirs, rms, their_rms, largest, touched) in zip(compared, numbers):
        # lse is not rounded to 16 bits, so float32's own error needs a bound: 8 units in the last place of the largest
        # lse.
        slack = 1e-5 + (1e-6 * largest if name == "lse" else 0)
        if touched:
            found.append(f"{name}: {touched:.0f} rows written that are not in use")
        if differ:
            found.append(f"{name}: {differ:.0f} NaN or infinities where they do not belong, or missing")
        if not ours <= 2 * theirs + slack:
            found.append(f"{name}: largest error {ours:.3e}, torch's {theirs:.3e}")
        if not rms <= 2 * their_rms + slack:
            found.append(f"{name}: rms error {rms:.3e}, torch's {their_rms:.3e}")
    return found
