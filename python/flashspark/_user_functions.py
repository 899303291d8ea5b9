"""From traced functions and block lists to the native call's arguments (bindings/functions.hpp)."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import site
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _core
from ._call import Mode, attend, is_direct
from ._call import _export as export
from ._packed_lists import is_packed, padded_lists
from ._signature import ATTENTION, NO_TAIL, in_tail
from ._tensors import Array, array, differentiable, empty_like, is_torch, stored
from ._trace import Traced, anchor_of, reference, traced, without_aux

_FIXED = len(ATTENTION.names)
_DEFAULT_BLOCK = 128
_MODE = 5  # the place of attend's `mode`
_DTYPE_CODES = {"bfloat16": 3}  # flashspark_dtype
_LIST_NAMES = tuple(  # as in bindings/names.hpp; flex_attention has others (flashspark._flex_call.WORDS)
    f"block_sparse_tensors.{name}" for name in ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
)


class _Native:
    """The native form of a function; equal functions share it while one is in use."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self, kind: str, text: str) -> None:
        _find_nvrtc()
        self.handle = (_core.score_mod_create if kind == "score" else _core.mask_mod_create)(text)

    def __del__(self, release: Callable[[int], None] = _core.mod_release) -> None:
        if hasattr(self, "handle"):
            release(self.handle)


_by_text: weakref.WeakValueDictionary[tuple[str, str], _Native] = weakref.WeakValueDictionary()


@functools.cache
def _find_nvrtc() -> None:
    """Tells the library where Python keeps NVIDIA's wheels, before the first function."""
    roots = dict.fromkeys([*sys.path, *site.getsitepackages(), site.getusersitepackages()])
    patterns = ["nvidia/cu1[3-9]/lib", "nvidia/cuda_nvrtc/lib"]
    if sys.platform == "win32":
        patterns = ["nvidia/cu1[3-9]/bin/x86_64", "nvidia/cuda_nvrtc/bin"]
    found = [
        folder for root in roots if root for pattern in patterns for folder in glob.glob(os.path.join(root, pattern))
    ]
    _core.set_nvrtc_search_path(os.pathsep.join(folder for folder in found if os.pathsep not in folder))


def native_of_text(kind: str, text: str) -> _Native:
    known = _by_text.get((kind, text))
    if known is None:
        known = _by_text[kind, text] = _Native(kind, text)
    return known


def native(function: Traced) -> _Native:
    """The native form of a traced function, which lives as long as the guards, which all calls of a function share."""
    if function.guards.native is None:
        function.guards.native = native_of_text(*function.key)
    return function.guards.native


class Lists:
    """Block lists of a call: counts (B or 1, Hq or 1, query blocks) and indices (.., key blocks), int32.

    masked: those that ask the mask function. full: those that keep all keys. size: (queries, keys) of a block.
    """

    __slots__ = ("full", "masked", "size")

    def __init__(
        self, masked: tuple[Array | None, Array | None], full: tuple[Array | None, Array | None], size: tuple[int, int]
    ) -> None:
        self.masked, self.full, self.size = masked, full, size


_NO_BLOCKS = (0, 0, None, None, None, None)


def _blocks(lists: Lists | None) -> tuple[Any, ...]:
    """Sizes and lists, as the native call takes them."""
    if lists is None:
        return _NO_BLOCKS
    return (*lists.size, *(_list(name, x) for name, x in zip(_LIST_NAMES, (*lists.masked, *lists.full))))


def captured_argument(x: Array) -> tuple[int, Array]:
    """A captured array as native calls take it: the flashspark_dtype that it stands for (0: its own), and itself."""
    if type(x) is np.ndarray and is_direct(x):
        return 0, x
    held = array("captured tensor", x)
    name = str(getattr(held, "dtype", "")).rpartition(".")[2]
    if name not in _DTYPE_CODES or is_torch(held):
        return 0, _exported("captured tensor", held)
    held, _ = stored(held, 0)  # a type that NumPy does not export
    return _DTYPE_CODES[name], _exported("captured tensor", held)


def _list(name: str, x: Array | None) -> Array | None:
    return None if x is None else _exported(name, array(name, x))


def _exported(name: str, x: Array) -> Array:
    """Read-only NumPy arrays in the way in which NumPy exports them."""
    return export(name, x) if isinstance(x, np.ndarray) and not x.flags.writeable else x


def extras(score: Traced | None, mask: Traced | None, lists: Lists | None) -> tuple[Any, ...]:
    """What follows the arguments of signature.def. The functions must outlive its use."""
    given = [(None, ()) if x is None else (native(x), x.tensors) for x in (score, mask)]
    return extras_of(given, lists, [[] if x is None else x.scalars for x in (score, mask)])


def extras_of(
    functions: Sequence[tuple[_Native | None, Sequence[Array]]],
    lists: Lists | None,
    scalars: Sequence[Sequence[float]] = ((), ()),
) -> tuple[Any, ...]:
    """The same (bindings/functions.hpp) of native functions, score and mask, with their tensors."""
    blocks = _blocks(lists)
    captured = [part for _, tensors in functions for x in tensors for part in captured_argument(x)]
    start = _start([function for function, _ in functions], [tensors for _, tensors in functions], scalars)
    return (*start, *blocks, *captured, *(float(x) for numbers in scalars for x in numbers))


def direct_extras(score: Traced | None, mask: Traced | None, lists: Lists | None) -> tuple[Any, ...]:
    """extras() without the scalars at its end, for arrays that need no conversion."""
    functions = [None if x is None else native(x) for x in (score, mask)]
    tensors = [() if x is None else x.tensors for x in (score, mask)]
    blocks = _NO_BLOCKS if lists is None else (*lists.size, *lists.masked, *lists.full)
    captured = [part for each in tensors for x in each for part in (0, x)]
    return (*_start(functions, tensors, [() if x is None else x.numbers for x in (score, mask)]), *blocks, *captured)


def _start(functions: Sequence[_Native | None], tensors: Sequence[Any], scalars: Sequence[Any]) -> list[int]:
    """Handles and counts."""
    counts = [len(each) for pair in zip(tensors, scalars) for each in pair]
    return [0 if function is None else function.handle for function in functions] + counts


def arguments(
    parameters: dict[str, Any], scale: float | None, implementation: str | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The head and the tail of flex_attention's native call. parameters: as flashspark._recognise names them."""
    left, right = parameters.get("window_left", -1), parameters.get("window_right", -1)
    head = (scale, "causal" in parameters, left, right, parameters.get("softcap", 0.0), 0, False, implementation, 0)
    if "alibi" not in parameters:
        return head, ()
    return head, (*NO_TAIL[: in_tail("alibi_slopes")], parameters["alibi"])


def empty_result(query: Array, value: Array) -> Array:
    """An uninitialised result (B, H, L, Dv), in memory by tokens if query is, as torch's."""
    batch, heads, rows, _ = query.shape
    if is_torch(query) and not query.is_contiguous() and query.transpose(1, 2).is_contiguous():
        return query.new_empty((batch, rows, heads, value.shape[-1])).transpose(1, 2)
    return empty_like(query, (batch, heads, rows, value.shape[-1]), query.dtype)


def padded(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arguments of signature.def, where trailing ones were left out."""
    return args if len(args) == _FIXED else (*args, *NO_TAIL[len(args) - _FIXED :])


class Functions:
    """The native call for `attend` with the user's functions: called with the arguments of signature.def, it adds what
    follows these.

    score, mask, lists: the functions' traces and the block lists. more: `extras` of them, where they are known already.
    """

    __slots__ = ("_more", "native", "traces")

    def __init__(
        self,
        traces: Callable[[], tuple[Traced | None, Traced | None, Lists | None]],
        more: tuple[Any, ...] | None = None,
        native: Callable[..., Any] = _core.attention_forward,
    ) -> None:
        """traces: gives score, mask and lists, and keeps alive what `more` refers to."""
        self.traces, self._more, self.native = traces, more, native

    @classmethod
    def of(cls, score: Traced | None, mask: Traced | None, lists: Lists | None, mode: Mode | None) -> Functions:
        """mode: of the call."""
        native = _core.attention_explain if mode is not None and mode.explain else _core.attention_forward
        return cls(lambda: (score, mask, lists), None, native)

    def extras(self) -> tuple[Any, ...]:
        if self._more is None:
            self._more = extras(*self.traces())
        return self._more

    def __call__(self, *args: Any) -> Any:
        return self.native(*padded(args), *self.extras())

    @property
    def captured(self) -> Sequence[Array]:
        """What score_mod captures, whose gradients may be wanted."""
        score = self.traces()[0]
        return () if score is None else score.tensors


def attending(
    base: Callable[..., Any],
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    aux_tensors: Sequence[Array] | None,
    aux_scalars: Sequence[float] | None = None,
    block_sparse_tensors: Any = None,
) -> Callable[..., Any]:
    """A function like `attend` for a call with FlashAttention-4's arguments. base: what the call uses without them."""
    for name, values in (("aux_tensors", aux_tensors), ("aux_scalars", aux_scalars)):
        if values is not None and not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} = {type(values).__name__}: must be a list or tuple, or None")
    if score_mod is None and mask_mod is None:
        for name, values in (("aux_tensors", aux_tensors), ("aux_scalars", aux_scalars)):
            if values:
                raise ValueError(f"{name} = {len(values)} values: must be None without score_mod and mask_mod")
        if block_sparse_tensors is None:
            return base
    if is_packed(block_sparse_tensors):
        return _with_packed_lists(base, score_mod, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    through_operators = getattr(base, "with_functions", None)  # of flashspark.torch_ops
    if through_operators is not None:
        return through_operators(score_mod, mask_mod, aux_tensors, aux_scalars, _fa4_lists(block_sparse_tensors))
    known = _known.get((anchor_of(score_mod)[0], anchor_of(mask_mod)[0]))
    if known is not None and base is attend and aux_scalars is None:
        lists = _fa4_lists(block_sparse_tensors)
        more = known.extras(score_mod, mask_mod, aux_tensors or (), lists)
        if more is not None:
            aux = list(aux_tensors or ())
            return _running(lambda _alive=known: _traces(score_mod, mask_mod, aux, None, lists), more)
    aux = [
        x if is_direct(x) or differentiable(x) else array(f"aux_tensors[{i}]", x)
        for i, x in enumerate(aux_tensors or ())
    ]
    numbers = list(aux_scalars) if aux_scalars else None
    traces = _traces(score_mod, mask_mod, aux, numbers, _fa4_lists(block_sparse_tensors))
    if aux_scalars is None:
        _remember(score_mod, mask_mod, [x for x in traces[:2] if x is not None], aux)
    return _running(lambda: traces, None, base)


def _traces(
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    aux: list[Array],
    numbers: list[float] | None,
    lists: Lists | None,
) -> tuple[Traced | None, Traced | None, Lists | None]:
    score = traced(score_mod, "score", "fa4", aux, numbers) if score_mod is not None else None
    mask = traced(mask_mod, "mask", "fa4", aux, numbers) if mask_mod is not None else None
    return score, mask, lists


def _with_packed_lists(base: Callable[..., Any], *functions_and_lists: Any) -> Callable[..., Any]:
    """attending() for lists whose shape depends on the call's lengths."""
    *functions, lists = functions_and_lists
    _fa4_lists(lists)

    def run(face: int, tensors: Any, out: Any, lse: Any, want_lse: bool, mode: Any, head: Any, tail: Any) -> Any:
        call = attending(base, *functions, padded_lists(lists, tensors, tail))
        return call(face, tensors, out, lse, want_lse, mode, head, tail)

    return run


def _running(
    traces: Callable[[], Any], more: tuple[Any, ...] | None, base: Callable[..., Any] = attend
) -> Callable[..., Any]:
    """A function like `attend`, with the functions that `traces` gives."""

    def run(*args: Any, function: Callable[..., Any] = _core.attention_forward) -> Any:
        mode = args[_MODE]
        explains = mode is not None and mode.explain
        return base(*args, Functions(traces, more, _core.attention_explain if explains else function))

    return run


class _Known:
    """What calls with one score_mod and one mask_mod have found, where aux_tensors are of some types and ranks."""

    __slots__ = ("kinds", "mask", "places", "scalars", "score", "start", "traces")

    def __init__(self, score: Any, mask: Any, traces: list[Traced], start: list[int], aux: list[Array]) -> None:
        """score, mask: weak references."""
        self.score, self.mask, self.traces, self.start = score, mask, traces, start
        self.kinds = [(x.dtype, x.ndim) for x in aux]
        # For each captured tensor its place in aux_tensors, or itself.
        self.places = [
            (place, None if place is not None else x) for each in traces for x, place in zip(each.tensors, each.sources)
        ]
        self.scalars = [number for each in traces for number in each.numbers]

    def extras(self, score: Any, mask: Any, aux: Sequence[Array], lists: Lists | None) -> tuple[Any, ...] | None:
        """extras() for another call; None if something has changed that the traces depend on."""
        if self.score() is not anchor_of(score)[1] or self.mask() is not anchor_of(mask)[1]:
            return None
        if len(aux) != len(self.kinds) or not all(each.guards.holds() for each in self.traces):
            return None
        for x, (dtype, rank) in zip(aux, self.kinds):
            if not is_direct(x) or x.dtype is not dtype or x.ndim != rank:
                return None
        if len(aux) > 1 and len(set(map(id, aux))) != len(aux):
            return None
        captured: list[Any] = []
        for place, x in self.places:
            if place is None and not is_direct(x):
                return None
            captured += (0, x if place is None else aux[place])
        return (*self.start, *_blocks(lists), *captured, *[float(x.value) for x in self.scalars])


_known: dict[tuple[Any, Any], _Known] = {}


def _remember(score_mod: Any, mask_mod: Any, traces: list[Traced], aux: list[Array]) -> None:
    """Keeps the traces of a call for the next one, unless they depend on more of aux_tensors than types and ranks."""
    if not all(map(is_direct, aux)) or len(set(map(id, aux))) != len(aux):
        return
    if any(each.guards.aux_shapes or not all(map(is_direct, each.tensors)) for each in traces):
        return
    (score_key, score), (mask_key, mask) = anchor_of(score_mod), anchor_of(mask_mod)
    by_kind = [next((x for x in traces if x.kind == kind), None) for kind in ("score", "mask")]
    start = _start(
        [None if x is None else native(x) for x in by_kind],
        [() if x is None else x.tensors for x in by_kind],
        [() if x is None else x.numbers for x in by_kind],
    )
    key = score_key, mask_key
    with contextlib.suppress(TypeError):  # an object that cannot be referred to weakly
        references = [reference(x, _known, key) for x in (score, mask)]
        _known[key] = _Known(*references, list(map(without_aux, traces)), start, aux)


def _fa4_lists(tensors: Any) -> Lists | None:
    """FlashAttention-4's lists. Without a block_size, 128 by 128."""
    if tensors is None:
        return None
    for name in ("mask_block_cnt", "mask_block_idx"):
        if getattr(tensors, name, None) is None:
            raise TypeError(f"block_sparse_tensors = {type(tensors).__name__}: must have the field {name}")
    full = (getattr(tensors, "full_block_cnt", None), getattr(tensors, "full_block_idx", None))
    if (full[0] is None) != (full[1] is None):
        raise ValueError("block_sparse_tensors.full_block_cnt and full_block_idx: must be given together")
    size = getattr(tensors, "block_size", None) or (_DEFAULT_BLOCK, _DEFAULT_BLOCK)
    return Lists((tensors.mask_block_cnt, tensors.mask_block_idx), full, (int(size[0]), int(size[1])))
