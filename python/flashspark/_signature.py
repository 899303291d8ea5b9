"""The arguments of the native calls: order, kinds, fallbacks and names, as bindings/signature.def declares them.

The native module carries the table itself, so the two cannot disagree. Kinds are explained in signature.def; a fallback
is what None and an argument that is left out read as, `REQUIRED` where there is none.
"""

from __future__ import annotations

from typing import Any

from . import _core

REQUIRED: Any = ...
_FALLBACKS = {"none": None, "required": REQUIRED, "false": False, "true": True, "0.0": 0.0}
TENSORS = frozenset({"rows", "result", "floats", "ints"})  # the kinds that are tensors


class Signature:
    """One native call. names, kinds and fallbacks are tuples in the order of the arguments.

    words: for each face (0: flash_attn_func and flash_attn_varlen_func, 1: flash_attn_with_kvcache, 2: _flash_attn_fwd)
    what it calls each argument; calls with one face have one tuple.
    """

    def __init__(self, call: str, text: str) -> None:
        rows = [line.split(" ")[1:] for line in text.splitlines() if line.startswith(call + " ")]
        self.kinds, self.names, fallbacks, *words = zip(*rows)
        self.fallbacks = tuple(_FALLBACKS[word] if word in _FALLBACKS else int(word) for word in fallbacks)
        self.words: tuple[tuple[str, ...], ...] = tuple(words)

    def index(self, name: str) -> int:
        return self.names.index(name)


_text = str(_core.signature())
ATTENTION = Signature("attention", _text)
APPEND = Signature("append", _text)
SCHEDULE = Signature("schedule", _text)

# Attention's arguments are q .. lse, then the head, which every call has, then the tail.
HEAD, TAIL = ATTENTION.index("softmax_scale"), ATTENTION.index("cu_seqlens_q")
NO_TAIL = tuple(None if fallback is REQUIRED else fallback for fallback in ATTENTION.fallbacks[TAIL:])


def in_tail(name: str) -> int:
    """Where attention's argument `name` stands in the tail."""
    return ATTENTION.index(name) - TAIL
