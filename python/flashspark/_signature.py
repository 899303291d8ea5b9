"""The arguments of the native calls: order, kinds, fallbacks and names, as bindings/signature.def declares them.

The table comes from the native module, so that the two cannot disagree. signature.def explains the kinds. A fallback is
the value that None, or an argument that is left out, stands for; `REQUIRED` where there is none.
"""

from __future__ import annotations

from typing import Any

from . import _core

REQUIRED: Any = ...
_FALLBACKS = {"none": None, "required": REQUIRED, "false": False, "true": True, "0.0": 0.0}
TENSORS = frozenset({"rows", "result", "floats", "ints"})  # the kinds of tensors


class Signature:
    """One native call. names, kinds and fallbacks are tuples in the order of the arguments.

    words: the names that each face (0: flash_attn_func and flash_attn_varlen_func, 1: flash_attn_with_kvcache,
    2: _flash_attn_fwd) gives its arguments. Native calls with a single face have one tuple.
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
BACKWARD = Signature("backward", _text)  # these stand before attention's
APPEND = Signature("append", _text)
SCHEDULE = Signature("schedule", _text)

# Attention's arguments are q .. lse, then the head, which every call passes, then the tail, which may be cut short.
HEAD, TAIL = ATTENTION.index("softmax_scale"), ATTENTION.index("cu_seqlens_q")
NO_TAIL = tuple(None if fallback is REQUIRED else fallback for fallback in ATTENTION.fallbacks[TAIL:])


def in_tail(name: str) -> int:
    """The index of attention's argument `name` in the tail."""
    return ATTENTION.index(name) - TAIL
