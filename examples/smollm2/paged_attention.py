"""A paged KV cache for several sequences, and attention over it with flashspark.

The cache of one layer is (num_pages, page_size, heads, head_dim). A sequence owns any pages, in any order; its row of
the page table lists them. Pages are handed out in random order and initialised with NaN, so that reading a wrong page
or too many rows is noticed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import flashspark
import numpy as np
from model import Config

UNUSED_SLOT = np.int32(0x7FFFFFFF)  # fills the page table past a sequence's end; must never be read
ORACLE = "cpu-reference"


@dataclass
class Report:
    """Number and time of the calls, and their error relative to the oracle's bound (a ratio above 1 is a failure)."""

    calls: int = 0
    seconds: float = 0.0
    checked: int = 0
    check_seconds: float = 0.0
    worst_error: float = 0.0
    worst_ratio: float = 0.0


class PagedAttention:
    """KV cache of up to `num_seqs` sequences of up to `max_tokens` tokens.

    `begin` says which sequences the next forward pass is for and how many new tokens each has; the pass then calls
    `attend` once a layer.
    """

    def __init__(
        self,
        config: Config,
        num_seqs: int,
        max_tokens: int,
        *,
        page_size: int = 16,
        dtype: np.dtype = np.dtype(np.float32),
        check: bool = False,
        seed: int = 0,
    ) -> None:
        slots = -(-max_tokens // page_size)
        num_pages = num_seqs * slots + 7  # some pages stay unused
        shape = (config.num_layers, num_pages, page_size, config.num_heads_kv, config.head_dim)
        self.k_cache = np.full(shape, np.nan, dtype)
        self.v_cache = np.full(shape, np.nan, dtype)
        self.page_table = np.full((num_seqs, slots), UNUSED_SLOT)
        self.lengths = np.zeros(num_seqs, np.int32)
        self.page_size, self.dtype, self.check = page_size, dtype, check
        self.prefill, self.decode = Report(), Report()
        self._free = list(np.random.default_rng(seed).permutation(num_pages))
        # The longest key and the largest value of each layer and sequence so far; they bound the error of an output.
        self._longest_k = np.zeros((config.num_layers, num_seqs), np.float32)
        self._largest_v = np.zeros((config.num_layers, num_seqs), np.float32)

    def begin(self, seqs: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """Makes room for counts[i] new tokens of sequence seqs[i]; returns the position of each new token."""
        self._seqs, self._counts = np.array(seqs), np.array(counts, np.int32)
        self._before = self.lengths[self._seqs]
        self.lengths[self._seqs] += self._counts
        for seq in self._seqs:
            row = self.page_table[seq]
            needed = -(-self.lengths[seq] // self.page_size)
            for slot in np.flatnonzero(row[:needed] == UNUSED_SLOT):
                row[slot] = self._free.pop()
        self._positions = np.concatenate([old + np.arange(n) for old, n in zip(self._before, self._counts)])
        self._owner = np.repeat(self._seqs, self._counts)
        return self._positions

    def release(self, seq: int) -> None:
        """Gives the pages of a finished sequence back, poisoned."""
        row = self.page_table[seq]
        pages = row[row != UNUSED_SLOT]
        self.k_cache[:, pages] = self.v_cache[:, pages] = np.nan
        self._free[:0] = pages
        row[:] = UNUSED_SLOT
        self.lengths[seq] = 0
        self._longest_k[:, seq] = self._largest_v[:, seq] = 0

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Attention of the new tokens to all earlier ones and themselves. q (T, 9, 64), k and v (T, 3, 64), float32."""
        start = time.perf_counter()
        q, k, v = (np.ascontiguousarray(x, self.dtype) for x in (q, k, v))
        decode = bool(np.all(self._counts == 1))
        out = self._decode(layer, q, k, v) if decode else self._prefill(layer, q, k, v)
        report = self.decode if decode else self.prefill
        report.seconds += time.perf_counter() - start
        report.calls += 1
        if self.check:
            start = time.perf_counter()
            self._compare(layer, q, k, v, out, report)
            report.check_seconds += time.perf_counter() - start
        return out.astype(np.float32)

    def _prefill(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Packed sequences of any lengths. NumPy writes the cache; the call reads it through the page table."""
        page = self.page_table[self._owner, self._positions // self.page_size]
        self.k_cache[layer, page, self._positions % self.page_size] = k
        self.v_cache[layer, page, self._positions % self.page_size] = v
        return self._varlen(layer, q)

    def _decode(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """One new token for each sequence; the call appends its key and value to the cache first."""
        return flashspark.flash_attn_with_kvcache(
            q[:, None],  # (B, 1, 9, 64)
            self.k_cache[layer],
            self.v_cache[layer],
            k=k[:, None],
            v=v[:, None],
            cache_seqlens=self._before,
            block_table=self.page_table[self._seqs],
            causal=True,
        )[:, 0]

    def _varlen(self, layer: int, q: np.ndarray, **options) -> np.ndarray:
        lengths = self.lengths[self._seqs]
        return flashspark.flash_attn_varlen_func(
            q,
            self.k_cache[layer],
            self.v_cache[layer],
            cu_seqlens_q=np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int32),
            max_seqlen_q=int(self._counts.max()),
            cu_seqlens_k=None,  # not needed: a paged cache is described by lengths and pages
            seqused_k=lengths,
            max_seqlen_k=int(lengths.max()),
            block_table=self.page_table[self._seqs],
            causal=True,
            **options,
        )

    def _compare(
        self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, report: Report
    ) -> None:
        """Compares an output with the oracle, which gets the same tensors and does not round its result."""
        k_norm = np.linalg.norm(k.astype(np.float32), axis=-1).max(axis=-1)
        v_size = np.abs(v.astype(np.float32)).max(axis=(-1, -2))
        np.maximum.at(self._longest_k[layer], self._owner, k_norm)
        np.maximum.at(self._largest_v[layer], self._owner, v_size)
        q_norm = np.linalg.norm(q.astype(np.float32), axis=-1)
        expected = self._varlen(layer, q, implementation=ORACLE, out=np.empty(q.shape, np.float32))
        bound = error_bound(
            expected,
            q_norm * self._longest_k[layer, self._owner, None] / np.sqrt(q.shape[-1]),
            self._largest_v[layer, self._owner, None],
            self.dtype,
        )
        error = np.abs(out.astype(np.float32) - expected)
        report.checked += 1
        report.worst_error = max(report.worst_error, float(np.nan_to_num(error, nan=np.inf).max()))
        report.worst_ratio = max(report.worst_ratio, float(np.nan_to_num(error / bound, nan=np.inf).max()))


def error_bound(expected: np.ndarray, score: np.ndarray, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The largest error of an output computed in float32 and rounded to `dtype`.

    score (T, heads): |q| max |k| / sqrt(D), an upper bound of the scores. value (T, 1): max |v|. A score is off by a
    few units of 2^-24 of its size, which changes every weight by that fraction; exponentials and sums add a few units
    more.
    """
    rounding = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype.name]
    weights = (4 * score + 16) * 2.0**-24
    return (2 * weights * value)[..., None] + rounding * 1.02 * np.abs(expected) + 2.0**-24
