"""Attention problems as the serving engines pose them: exact-size metadata between poisoned neighbours, NaN in every
byte of q, k and v that no query may see, garbage behind the end of every page table row."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flashspark
import numpy as np
import torch

# Run the tests on CPU tensors, to check the tests themselves.
ON_CPU = os.environ.get("FLASHSPARK_GPU_TESTS_ON_CPU") == "1"
# Follows every list of lengths or pages; a kernel that uses it faults.
POISON_INT = 2**30 + 7
LARGEST, SMALLEST = 2**31 - 1, -(2**31)
GUARD = 1024  # NaN elements before and after every tensor; a multiple of 16 bytes


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A function that replays `call` from a CUDA graph. `call` has run before, so its kernels are loaded. On CPU:
    `call`."""
    if ON_CPU:
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


METADATA = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "kv_batch_index", "page_table"),
    *("causal_per_seq", "prefix_ranges", "rswa_prefix_lens"),
)


@dataclass
class Spec:
    """Describes a problem. Lengths are those in use; `build` makes up everything else around them."""

    q_lens: list[int]
    k_lens: list[int]
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.bfloat16
    fp8: str = ""  # kv: K and V are e4m3; qkv: q as well. Both have descale factors.
    layout: str = "paged"  # paged, varlen (packed keys), dense (equal capacities), dense_paged (dense q)
    page_size: int = 16
    cache: str = "separate"  # separate, packed (V after K in a row), planes (K and V of a page), heads_first
    fused_q: bool = False  # q is a slice of wider rows
    seqused_q: bool = False  # more rows than are in use
    seqused_k: bool = False  # varlen: more keys than are in use
    leftpad: bool = False
    batch_index: bool = False  # cache rows, or page-table rows, in another order
    whole_table: bool = False  # paged: no seqused_k, all pages of the table are in use
    shared_prefix: bool = False  # sequences share pages
    loose_bounds: bool = False  # max_seqlen_q, max_seqlen_k above the real ones
    poison_unkept: bool = True  # NaN also in keys that the mask hides from every row, not only in unused slots
    scale: float = 1.0  # of q's values: sharper or flatter softmax
    causal: bool = True
    causal_per_seq: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: torch.dtype | None = None
    alibi: int = 0  # 1: (Hq,), 2: (B, Hq)
    rel_extent: int = 0
    prefix: str = ""  # per_seq, per_token
    clamp: bool = False
    rswa: int = 0
    chunk: int = 0  # attention_chunk
    e4m3_out: bool = False  # e4m3 output with output_scale
    check: bool = False  # check_device
    lse: bool = True
    num_splits: int = 0
    deterministic: bool = False
    schedule: str = ""  # scheduler_metadata: fresh, or stale (made from other lengths)


@dataclass
class Problem:
    spec: Spec
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    host: dict[str, np.ndarray]
    device: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    metadata: torch.Tensor | None = None

    def reschedule(self) -> None:
        """Makes or refreshes the scheduler metadata in place; it is empty if the problem does not use any."""
        d, spec, dense = self.device, self.spec, self.q.ndim == 4
        if not spec.schedule or "seqused_k" not in d:
            return
        lengths = d["seqused_k"]
        if spec.schedule == "stale":
            lengths = torch.from_numpy(self.host["seqused_k"] // 2).to(lengths.device)
        self.metadata = flashspark.get_scheduler_metadata(
            len(spec.q_lens), self.q.shape[1] if dense else self.max_seqlen_q, self.max_seqlen_k, *spec.heads,
            spec.dims[0], lengths, torch.float8_e4m3fn if spec.fp8 else spec.dtype, spec.dims[1],
            d.get("cu_seqlens_q"), cache_leftpad=d.get("leftpad_k"), causal=spec.causal, window_size=spec.window,
            has_softcap=spec.softcap > 0, num_splits=spec.num_splits, seqused_q=d.get("seqused_q"),
            cache_batch_idx=d.get("kv_batch_index"), causal_per_seq=d.get("causal_per_seq"),
            deterministic=spec.deterministic, attention_chunk=spec.chunk, out=self.metadata,
        )  # fmt: skip

    def sequences(self) -> np.ndarray:
        """(5, B): first query row, queries, first key row, keys, causal, computed in NumPy as flashspark.h defines
        them."""
        h, spec = self.host, self.spec
        b = len(spec.q_lens)
        zero = np.zeros(b, np.int64)
        if "cu_seqlens_q" in h:
            q_row, q_len = h["cu_seqlens_q"][:-1].astype(np.int64), np.diff(h["cu_seqlens_q"].astype(np.int64))
        else:
            q_row, q_len = zero, zero + self.q.shape[1]
        q_len = h["seqused_q"].astype(np.int64) if "seqused_q" in h else q_len
        if "cu_seqlens_k" in h:
            k_row, k_len = h["cu_seqlens_k"][:-1].astype(np.int64), np.diff(h["cu_seqlens_k"].astype(np.int64))
        else:
            pages = h["page_table"].shape[1] if "page_table" in h else 1
            k_row, k_len = zero, zero + pages * self.k.shape[1]
        k_len = h["seqused_k"].astype(np.int64) if "seqused_k" in h else k_len
        if "leftpad_k" in h:
            k_row, k_len = k_row + h["leftpad_k"], np.maximum(k_len - h["leftpad_k"], 0)
        causal = h["causal_per_seq"].astype(np.int64) if "causal_per_seq" in h else zero + int(spec.causal)
        return np.stack([q_row, q_len, k_row, k_len, causal])

    def empty_results(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """out and lse filled with NaN, so that elements never written are visible."""
        out = self.q.new_full((*self.q.shape[:-1], self.v.shape[-1]), float("nan"))
        if self.spec.e4m3_out:
            out = torch.full(out.shape, 0x7F, dtype=torch.uint8, device=out.device).view(torch.float8_e4m3fn)
        shape = (self.q.shape[1], self.q.shape[0]) if self.q.ndim == 3 else tuple(self.q.shape[i] for i in (0, 2, 1))
        return out, self.q.new_full(shape, float("nan"), dtype=torch.float32) if self.spec.lse else None

    def run(self, out: torch.Tensor | None = None, lse: torch.Tensor | None = None, **changes: Any) -> Any:
        """Calls the package; returns out and lse, which are filled with NaN first unless given."""
        if out is None:
            out, lse = self.empty_results()
        d, spec = self.device, self.spec
        arguments: dict[str, Any] = {
            **self.options,
            **{name: d.get(name) for name in ("seqused_q", "causal_per_seq", "prefix_ranges", "rswa_prefix_lens")},
            **{"causal": spec.causal, "window_size": spec.window, "softcap": spec.softcap, "out": out, "lse": lse},
            **{"rswa_window": spec.rswa, "prefix_clamp_window": spec.clamp, "num_splits": spec.num_splits},
            **{"deterministic": spec.deterministic, "return_softmax_lse": spec.lse, "attention_chunk": spec.chunk},
            **{"check_device": spec.check, **changes},
        }
        q, k, v = self.q, self.k, self.v
        if spec.fp8:
            q, k, v = as_e4m3(q) if spec.fp8 == "qkv" else q, as_e4m3(k), as_e4m3(v)
        table = d.get("page_table")
        plain = self.q.ndim == 4 and table is None and not (spec.leftpad or spec.batch_index)  # flash_attn_func
        if self.metadata is not None and not plain:
            arguments["scheduler_metadata"] = self.metadata
        if spec.leftpad or spec.batch_index or (table is not None and self.q.ndim == 4):
            result = flashspark.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=d.get("seqused_k"), cache_leftpad=d.get("leftpad_k"),
                cache_batch_idx=d.get("kv_batch_index"), block_table=table, cu_seqlens_q=d.get("cu_seqlens_q"),
                max_seqlen_q=self.max_seqlen_q if self.q.ndim == 3 else None, max_seqlen_k=self.max_seqlen_k,
                **arguments,
            )  # fmt: skip
        elif self.q.ndim == 4:
            result = flashspark.flash_attn_func(q, k, v, seqused_k=d.get("seqused_k"), **arguments)
        else:
            result = flashspark.flash_attn_varlen_func(
                q, k, v, d["cu_seqlens_q"], d.get("cu_seqlens_k"), self.max_seqlen_q, self.max_seqlen_k,
                block_table=table, seqused_k=d.get("seqused_k"), **arguments,
            )  # fmt: skip
        return result if changes.get("explain") else (out, lse)

    def explain(self) -> str:
        return str(self.run(explain=True))


def as_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The same values as float8_e4m3fn, with the same strides, surrounded by NaN."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    flat = torch.full((reach + 2 * GUARD,), 0x7F, dtype=torch.uint8, device=x.device)[GUARD : GUARD + reach]
    stored = flat.view(torch.float8_e4m3fn).as_strided(x.shape, x.stride())
    return stored.copy_(x)


def arena(host: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Every list in one allocation, at its exact size, with poison in between; a page table has a stride beyond its
    rows."""
    parts: list[np.ndarray] = [np.full(64, POISON_INT, np.int32)]
    places: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {}
    at = 64
    for name, values in host.items():
        stored = values
        if name == "page_table":
            stored = np.full((values.shape[0], values.shape[1] + 3), POISON_INT, np.int32)
            stored[:, : values.shape[1]] = values
        strides = tuple(s // 4 for s in np.ascontiguousarray(stored).strides)
        places[name] = (at, values.shape, strides)
        parts += [stored.reshape(-1), np.full(65, POISON_INT, np.int32)]  # 65: leaves the next list unaligned
        at += stored.size + 65
    flat = torch.from_numpy(np.concatenate(parts)).to(device)
    return {name: flat.as_strided(shape, strides, start) for name, (start, shape, strides) in places.items()}


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A NaN tensor surrounded by NaN."""
    count = int(np.prod(shape))
    flat = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    return flat[GUARD : GUARD + count].view(shape)


def offsets(lengths: list[int] | np.ndarray, first: int = 0) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32) + np.int32(first)


def _queries(spec: Spec, rng: np.random.Generator, host: dict[str, np.ndarray], like: dict[str, Any]) -> torch.Tensor:
    heads, dim, used = spec.heads[0], spec.dims[0], np.array(spec.q_lens)
    width = heads + 2 * spec.heads[1] if spec.fused_q else heads
    if spec.layout.startswith("dense"):
        rows = int(used.max(initial=1)) + (3 if spec.seqused_q else 0)
        if spec.seqused_q or (used != rows).any():
            host["seqused_q"] = used.astype(np.int32)
        q = guarded((len(used), rows, width, dim), **like)
        taken = np.arange(rows)[None] < used[:, None]
    else:
        room = used + (rng.integers(0, 4, len(used)) if spec.seqused_q else 0)
        first = int(rng.integers(0, 3)) if spec.seqused_q else 0
        host["cu_seqlens_q"] = offsets(room, first)
        if spec.seqused_q:
            host["seqused_q"] = used.astype(np.int32)
        q = guarded((first + int(room.sum()) + (5 if spec.seqused_q else 0), width, dim), **like)
        taken = np.zeros(len(q), bool)
        for start, count in zip(host["cu_seqlens_q"], used):
            taken[start : start + count] = True
    q[..., :heads, :].normal_(std=spec.scale)
    if not taken.all():
        q[torch.from_numpy(~taken).to(q.device)] = float("nan")
    return q[..., :heads, :]


def _cache(spec: Spec, outer: int, inner: int, like: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    heads, (dim, dim_v) = spec.heads[1], spec.dims
    if spec.cache == "packed":
        rows = guarded((outer, inner, heads, dim + dim_v), **like)
        return rows[..., :dim], rows[..., dim:]
    if spec.cache == "planes" and dim == dim_v:
        pages = guarded((outer, 2, inner, heads, dim), **like)
        return pages[:, 0], pages[:, 1]
    if spec.cache == "heads_first":
        k, v = (guarded((outer, heads, inner, d), **like).transpose(1, 2) for d in (dim, dim_v))
        return k, v
    k, v = (guarded((outer, inner, heads, d), **like) for d in (dim, dim_v))
    return k, v


def _pages(spec: Spec, rng: np.random.Generator, used: np.ndarray) -> tuple[np.ndarray, int]:
    """A page table with garbage after the end of every row, and the number of pages."""
    counts = -(-used // spec.page_size)
    spare = 3
    order = rng.permutation(int(counts.sum()) + spare).astype(np.int32)
    width = int(counts.max(initial=1)) + (0 if spec.whole_table else int(rng.integers(0, 3)))
    # Stale entries: valid page numbers, whose pages hold NaN or another sequence's keys, and invalid ones.
    table = rng.integers(0, len(order), (len(used), max(width, 1)), dtype=np.int32)
    if rng.random() < 0.5:
        table[:] = POISON_INT
    ends = np.cumsum(counts)
    for b, count in enumerate(counts):
        table[b, :count] = order[ends[b] - count : ends[b]]
    if spec.shared_prefix and len(used) > 1:
        common = int(counts[counts > 0].min(initial=0)) // 2
        table[counts > 0, :common] = table[int(np.argmax(counts > 0)), :common]
    return table, len(order)


def _ranges(spec: Spec, rng: np.random.Generator, problem: Problem) -> np.ndarray:
    """Disjoint ranges of each sequence, with unused slots; or for each query row the range that contains it."""
    _, q_len, _, k_len, _ = problem.sequences()
    slots = 3
    ranges = np.full((len(q_len), slots, 2), -1, np.int32)
    for b, count in enumerate(k_len):
        if q_len[b] == 0 or count < 2 * slots:
            continue
        cuts = np.sort(rng.choice(int(count), 2 * slots, replace=False)).reshape(slots, 2)
        ranges[b] = cuts
        ranges[b, int(rng.integers(slots))] = rng.choice([[-1, -1], [7, 3]])
    if spec.prefix == "per_seq":
        return ranges
    rows = problem.q.shape[0] if problem.q.ndim == 3 else problem.q.shape[0] * problem.q.shape[1]
    per_token = np.full((rows, 2), -1, np.int32)
    first = problem.sequences()[0] if problem.q.ndim == 3 else np.arange(len(q_len)) * problem.q.shape[1]
    for b, count in enumerate(q_len):
        position = np.arange(count) + k_len[b] - count
        for start, end in ranges[b]:
            inside = (position >= start) & (position <= end) & (start >= 0)
            per_token[first[b] : first[b] + count][inside] = (start, end)
    return per_token


def build(spec: Spec, seed: int, device: torch.device | str) -> Problem:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    like: dict[str, Any] = {"dtype": spec.dtype, "device": torch.device(device)}
    host: dict[str, np.ndarray] = {}
    q_used, k_used, batch = np.array(spec.q_lens), np.array(spec.k_lens), len(spec.q_lens)
    q = _queries(spec, rng, host, like)
    if spec.leftpad:
        host["leftpad_k"] = rng.integers(0, 40, batch).astype(np.int32)
        k_used = k_used + host["leftpad_k"]
    idle = q_used == 0
    if spec.layout.endswith("paged"):
        if spec.whole_table:
            k_used = np.full(batch, -(-max(1, *k_used, 1) // spec.page_size) * spec.page_size)
        host["page_table"], pages = _pages(spec, rng, np.where(idle, 0, k_used))
        # Rows without queries have stale lengths that exceed the table.
        if not spec.whole_table:
            host["seqused_k"] = np.where(idle, POISON_INT, k_used).astype(np.int32)
        if spec.batch_index:
            rows = rng.permutation(batch + 2)
            host["kv_batch_index"] = rows[:batch].astype(np.int32)
            host["page_table"] = np.concatenate(
                [host["page_table"], np.full_like(host["page_table"][:1].repeat(2, 0), POISON_INT)]
            )[np.argsort(rows)]
        k, v = _cache(spec, pages, spec.page_size, like)
    elif spec.layout == "varlen":
        room = k_used + (rng.integers(0, 20, batch) if spec.seqused_k else 0)
        host["cu_seqlens_k"] = offsets(room)
        if spec.seqused_k:
            host["seqused_k"] = np.where(idle, POISON_INT, k_used).astype(np.int32)
        k, v = (x[0] for x in _cache(spec, 1, int(room.sum()), like))
    else:
        capacity, rows = int(k_used.max(initial=1)) + (5 if spec.seqused_k else 0), batch
        if (k_used != capacity).any() or spec.leftpad or spec.batch_index:
            host["seqused_k"] = np.where(idle, POISON_INT, k_used).astype(np.int32)
        if spec.batch_index:
            rows = batch + 2
            host["kv_batch_index"] = rng.permutation(rows)[:batch].astype(np.int32)
        k, v = _cache(spec, rows, max(capacity, 1), like)
    k.normal_()
    v.normal_()
    if spec.fp8:  # values representable in e4m3, exact in the oracle's 16 bits
        for x in (k, v, q) if spec.fp8 == "qkv" else (k, v):
            x.copy_(x.to(torch.float8_e4m3fn))
    if spec.causal_per_seq:
        host["causal_per_seq"] = rng.integers(0, 2, batch).astype(np.int32)
    problem = Problem(spec, q, k, v, host, {})
    _score_options(problem, rng)
    if spec.prefix:
        host["prefix_ranges"] = _ranges(spec, rng, problem)
    if spec.rswa:
        host["rswa_prefix_lens"] = rng.integers(0, 48, batch).astype(np.int32)
    loose = int(rng.integers(1, 200)) if spec.loose_bounds else 0
    problem.max_seqlen_q = int(q_used.max(initial=0)) + (3 if spec.seqused_q else 0) + loose
    counted = k_used if spec.layout == "varlen" else np.where(idle, 0, k_used)
    problem.max_seqlen_k = int(counted.max(initial=0)) + (20 if spec.seqused_k else 0) + 10 * loose
    problem.device = arena(host, like["device"])
    problem.reschedule()
    return problem


def _score_options(problem: Problem, rng: np.random.Generator) -> None:
    spec, q, options = problem.spec, problem.q, problem.options
    heads = q.shape[-2]
    if rng.random() < 0.3:
        options["softmax_scale"] = float(1.3 / np.sqrt(spec.dims[0]))
    for name in ("q_descale", "k_descale", "v_descale") if spec.fp8 else ():
        whole = torch.rand(len(spec.q_lens), spec.heads[1], device=q.device) + 0.5
        # One factor for all with strides of 0, as vLLM passes it; one per head; one per sequence and head; none.
        kinds = (whole[:1, :1].expand(whole.shape), whole[:1].expand(whole.shape), whole, None)
        if (scale := kinds[int(rng.integers(4))] if len(whole) else None) is not None:
            options[name] = scale
    if spec.sinks is not None:
        options["sinks"] = torch.randn(heads, device=q.device).to(spec.sinks)
    if spec.alibi:
        shape = (heads,) if spec.alibi == 1 else (len(spec.q_lens), heads)
        options["alibi_slopes"] = torch.rand(shape, device=q.device) * 0.5
    if spec.e4m3_out:
        options["output_scale"] = torch.full((1,), 0.02, device=q.device)
    if spec.rel_extent:
        options["rel_logits"] = torch.randn((*q.shape[:-1], spec.rel_extent), device=q.device).to(spec.dtype)


def wild(rng: np.random.Generator, values: np.ndarray, at: tuple | slice) -> np.ndarray:
    """`values` with wild ones at some of the positions `at`."""
    result = values.copy()
    part = result[at]
    largest = int(values.max(initial=0))
    kinds = [SMALLEST, -1, LARGEST, LARGEST - 7, largest + 1, -largest - 1, 2**30 + 7, 0]
    if values.dtype == np.int64:
        kinds += [2**62, -(2**63)]
    choice = rng.choice(kinds, part.shape)
    random = rng.integers(SMALLEST, LARGEST, part.shape, dtype=np.int64)
    part[...] = np.where(rng.random(part.shape) < 0.6, np.where(rng.random(part.shape) < 0.7, choice, random), part)
    if (part == values[at]).all():
        part[...] = choice
    result[at] = part
    return result
