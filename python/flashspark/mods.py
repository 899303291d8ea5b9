"""Tags for `_flash_attn_fwd`'s score_mod and mask_mod.

FlashAttention 4 takes Python functions there and compiles them into its kernels. flashspark has the ones that models
use built in. A tag says which one, and `aux_tensors` carries its data:

=============  =========  =====================================================================================
tag            argument   aux_tensors
=============  =========  =====================================================================================
``RelBias``    score_mod  [rel_logits (total_q, num_heads, extent)]
``MmPrefix``   mask_mod   [ranges (num_seqs, num_ranges, 2) int32] or [ranges (total_q, 2) int32, cu_seqlens_q]
``RSwa``       mask_mod   [prefix_lens (num_seqs,) int32, window (1,) int32]
=============  =========  =====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RelBias:
    """Adds rel_logits[i, h, pos - j] to the score of query i and key j where 0 <= pos - j < extent."""


@dataclass(frozen=True)
class MmPrefix:
    """PrefixLM: causal attention in which the tokens of one range (an image) see each other in both directions.

    window_left: keys before the query's position that the causal part keeps, inclusive. None: the call's own window.
    clamp_window: ranges, too, keep only keys within window_left of the query.
    """

    window_left: int | None = None
    clamp_window: bool = False


@dataclass(frozen=True)
class RSwa:
    """Causal; keeps a sequence's first prefix_len keys and the last `window` keys up to the query's position.

    window: None: read from aux_tensors[1], which waits for the GPU if that tensor is on one.
    """

    window: int | None = None
