"""dropout_reference.py on torch tensors, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import dropout_reference
import torch

LOW = 0xFFFFFFFF


def philox(key, counter):
    """dropout_reference.philox on int64 tensors, whose products wrap as the unsigned ones do."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (second >> 32 & LOW) ^ c1 ^ k0,
            second & LOW,
            (first >> 32 & LOW) ^ c3 ^ k1,
            first & LOW,
        )
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return c0, c1, c2, c3


def dropped_of(sequences: Sequence[int], state, p, heads, rows, keys, device):
    """bool (sequences, heads, rows, keys): what these sequences of a call lose, by the definition."""
    seed, offset = (int(x) % 2**64 for x in state)
    key = dropout_reference.philox((seed & LOW, seed >> 32), (offset & LOW, offset >> 32, 0, 0))[:2]
    at = lambda n, d: torch.as_tensor(n, device=device).view(*(-1 if i == d else 1 for i in range(4)))  # noqa: E731
    b, h, i, j = (at(n, d) for d, n in enumerate((sequences, *map(torch.arange, (heads, rows, keys)))))
    draws = torch.stack(torch.broadcast_tensors(*philox([int(k) for k in key], (j // 64 * 4 + j % 8 // 2, i, h, b))))
    word = draws.gather(0, (j % 64 // 16).expand(draws.shape[1:])[None])[0]
    turn = j % 2 * 16 + j % 16 // 8 * 8
    return dropout_reference.is_dropped((word >> turn | word << 32 - turn) & 0x7FFF, p)


def dropped(state, p, batch, heads, rows, keys, device):
    """bool (batch, heads, rows, keys) of a batch of sequences of one length."""
    return dropped_of(range(batch), state, p, heads, rows, keys, device)
