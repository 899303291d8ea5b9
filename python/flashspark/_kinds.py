"""Converts the arguments that callers may write into those that the native call takes, by kind (signature.def).

Numbers may be Python's, NumPy scalars, or 0-d arrays and tensors. Reading a tensor on a GPU waits for the GPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ._signature import Signature
from ._tensors import array, is_cupy, is_masked, is_torch


def _scalar(name: str, value: Any, wanted: str) -> Any:
    """The number in a 0-d array or tensor; anything else unchanged."""
    if not isinstance(value, np.generic):
        if not (isinstance(value, np.ndarray) or is_torch(value) or is_cupy(value)):
            return value
        if len(_shape(value)) != 0 or is_masked(value):
            raise TypeError(f"{name} = {_word(value)}: must be {wanted}")
        value = array(name, value)
    try:
        return value.item()
    except Exception as error:  # such as a stream that is being captured, which cannot be waited for
        raise ValueError(f"{name} = {_word(value)}: cannot be read ({str(error).splitlines()[0]})") from None


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an array or tensor; one dimension for a nested tensor, whose own shape cannot be asked for."""
    return (0,) if is_torch(value) and value.is_nested else tuple(value.shape)


def _word(value: Any) -> str:
    if isinstance(value, np.generic):
        return f"{value!r}"
    if isinstance(value, np.ndarray) or is_torch(value) or is_cupy(value):
        return "a tensor"
    if isinstance(value, (list, tuple)):
        return "a list or tuple"
    for kind, word in ((bool, "a bool"), (int, "an int"), (float, "a float"), (str, "a str")):
        if isinstance(value, kind):
            return word
    return "None" if value is None else f"a {type(value).__name__}"


def integer(name: str, value: Any) -> int:
    """An int of 64 bits. A bool is refused, since it is most likely meant for another argument."""
    if type(value) is not int:
        value = _scalar(name, value, "an int")
        try:
            value = operator.index("" if isinstance(value, bool) else value)
        except TypeError:
            raise TypeError(f"{name} = {_word(value)}: must be an int") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} = {value}: must fit in 64 bits")
    return value


def bound(name: str, value: Any) -> int:
    value = integer(name, value)
    if value < 0:
        raise ValueError(f"{name} = {value}: must be at least 0, or None")
    return value


def window(name: str, value: Any) -> int:
    """One side of a window; any negative number is an open side."""
    return max(integer(name, value), -1)


def real(name: str, value: Any) -> float:
    if type(value) is not float:
        value = _scalar(name, value, "a float")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} = {_word(value)}: must be a float")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} = {value}: must fit in a float") from None


def flag(name: str, value: Any) -> bool:
    """A bool, or 0 or 1."""
    value = _scalar(name, value, "a bool")
    if isinstance(value, bool):
        return value
    if not isinstance(value, int):
        raise TypeError(f"{name} = {_word(value)}: must be a bool")
    if value not in (0, 1):
        raise ValueError(f"{name} = {value}: must be 0 or 1")
    return bool(value)


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} = {_word(value)}: must be a str")
    return str(value)


def _result(name: str, value: Any) -> Any:
    return array(name, value, written=True)


def _code(_: str, value: Any) -> Any:
    return value


KINDS: dict[str, Callable[[str, Any], Any]] = {
    **{"code": _code, "rows": array, "result": _result, "floats": array, "ints": array},
    **{"integer": integer, "bound": bound, "window": window, "real": real, "flag": flag, "text": text},
}


# Values of exactly these types need no conversion.
_EXACT = {"code": int, "flag": bool, "real": float, "text": str}


def settled(signature: Signature, face: int, values: tuple[Any, ...]) -> list[Any]:
    """The values of a native call, converted by kind. Raises TypeError or ValueError, which name the argument."""
    words = signature.words[face]
    return [
        value if value is None or type(value) is _EXACT.get(kind) else KINDS[kind](word, value)
        for kind, word, value in zip(signature.kinds, words, values)
    ]


def pair(window_size: Any) -> tuple[Any, Any]:
    """(left, right) of flash-attention's window_size: a tuple, list or array of two; None is an open side."""
    if window_size is None:
        return None, None
    try:
        left, right = () if isinstance(window_size, (set, frozenset, dict, str, bytes)) else window_size
    except Exception:  # noqa: BLE001 - anything that does not unpack into two
        raise ValueError(
            f"window_size = {_short(window_size)}: must be (left, right), -1 or None for an open side"
        ) from None
    return left, right


def _short(value: Any) -> str:
    return _word(value) if is_torch(value) else f"{value!r:.80}"


def is_open(name: str, side: Any) -> bool:
    """Whether this side of a window is open."""
    return side is None or window(name, side) < 0


def one_spelling(spelled: dict[str, str], **given: Any) -> Any:
    """The value given under one of several names of an argument, the function's own name first; None without one.

    Records in `spelled` which name the caller used, for errors. Raises ValueError if two names have different values.
    """
    own, chosen = next(iter(given)), None
    for name, value in given.items():
        if value is None or (chosen is not None and value is given[chosen]):
            continue
        if chosen is not None:
            raise ValueError(f"{name} = given: must be None beside {chosen}, which means the same")
        chosen = name
    if chosen is None:
        return None
    if chosen != own:
        spelled[own] = chosen
    return given[chosen]


def any_flag(**given: Any) -> bool:
    """Whether any of these flags is true. All of them are checked."""
    return any([flag(name, value) for name, value in given.items() if value is not None])


def refuse_qv(qv: Any) -> None:
    if qv is not None:
        raise NotImplementedError("qv = given: must be None, a second query tensor (MLA's) is not supported")
