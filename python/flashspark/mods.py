"""Tags for `_flash_attn_fwd`'s score_mod and mask_mod, and numbers that functions capture.

FlashAttention 4 takes Python functions there and compiles them into its kernels. So does flashspark, which has the ones
that models use built in. A tag says which one, and `aux_tensors` carries its data:

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


class Scalar:
    """A number that a function captures and that may change between calls without a new trace or kernel.

    value: a float (f32 in the graph) or an int (i32). Assigning a new value is seen by the next call. What was made
    with an int takes ints only.
    """

    __slots__ = ("__weakref__", "_value")

    def __init__(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"value = {value!r}: must be an int or a float")
        self._value = value

    @property
    def value(self) -> float:
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        wanted = (int, float) if isinstance(self._value, float) else int
        if isinstance(value, bool) or not isinstance(value, wanted):
            kind = "a float" if isinstance(self._value, float) else "an int, as it was at first"
            raise TypeError(f"value = {value!r}: must be {kind}")
        self._value = type(self._value)(value)

    def __repr__(self) -> str:
        return f"flashspark.mods.scalar({self._value!r})"


def scalar(value: float) -> Scalar:
    """A number that may change between calls; see Scalar."""
    return Scalar(value)
