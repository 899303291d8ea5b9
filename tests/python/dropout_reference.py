"""Which probabilities dropout drops, by docs/design/dropout.md, in NumPy. Shares no code with the library."""

from __future__ import annotations

import numpy as np

LOW = np.uint64(0xFFFFFFFF)


def philox(key, counter):
    """Philox4x32-10: four words of 32 bits, as uint64, of two and four words, which may be arrays."""
    k0, k1 = (np.uint64(k) for k in key)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = second >> np.uint64(32) ^ c1 ^ k0, second & LOW, first >> np.uint64(32) ^ c3 ^ k1, first & LOW
        k0, k1 = k0 + np.uint64(0x9E3779B9) & LOW, k1 + np.uint64(0xBB67AE85) & LOW
    return c0, c1, c2, c3


def dropped_draws(p):
    """How many of 2^15 draws are dropped. p as the C interface has it, in float32; halves are rounded up."""
    return min(int(np.floor(float(np.float32(p)) * 32768 + 0.5)), 32767)


def is_dropped(draw, p):
    """Of draws: the smallest are dropped, or kept if that is less."""
    count = dropped_draws(p)
    return draw < count if count <= 16384 else draw >= 32768 - count


def dropped(state, p, sequence, heads, rows, keys):
    """bool (heads, rows, keys): what sequence number `sequence` of a call loses. state: (seed, offset)."""
    (seed, offset) = (int(x) % 2**64 for x in state)
    key = philox((seed % 2**32, seed >> 32), (offset % 2**32, offset >> 32, 0, 0))[:2]
    h, i, j = np.ogrid[:heads, :rows, :keys]
    words = np.stack(philox(key, (j // 64 * 4 + j % 8 // 2, i, h, sequence)))
    word = np.take_along_axis(words, np.broadcast_to(j % 64 // 16, words.shape[1:])[None], 0)[0]
    turned = (word << np.uint64(32) | word) >> (j % 2 * 16 + j % 16 // 8 * 8).astype(np.uint64)
    return is_dropped(turned & np.uint64(0x7FFF), p)


def dropped_dense(state, p, batch, heads, rows, keys):
    """The same of a batch of sequences of one length: (batch, heads, rows, keys)."""
    return np.stack([dropped(state, p, b, heads, rows, keys) for b in range(batch)])
