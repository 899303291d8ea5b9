"""Builders of varlen and paged inputs."""

from __future__ import annotations

import numpy as np


def offsets(lengths) -> np.ndarray:
    """int32 cu_seqlens of the lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def pages(rng, ks, vs, page_size, *, spare=3, width=None, poison=np.nan):
    """Splits sequences into shuffled pages.

    Returns k_cache, v_cache (pages, page_size, heads, ..) and block_table. Slots that no sequence uses, in pages of
    their own and after the end of a sequence, hold `poison`; unused table entries are far outside the cache.
    """
    counts = [-(-len(k) // page_size) for k in ks]
    order = rng.permutation(sum(counts) + spare)
    caches = [np.full((len(order), page_size, *x[0].shape[1:]), poison, x[0].dtype) for x in (ks, vs)]
    table = np.full((len(ks), (width or max(counts)) + 2), 2**30, np.int32)
    used = 0
    for b, count in enumerate(counts):
        for n in range(count):
            page = order[used]
            used += 1
            table[b, n] = page
            for cache, rows in zip(caches, (ks[b], vs[b]), strict=True):
                part = rows[n * page_size : (n + 1) * page_size]
                cache[page, : len(part)] = part
    return caches[0], caches[1], table
