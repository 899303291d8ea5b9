"""From Python arguments to one native call: fast paths for plain arrays and tensors, and a general path.

A fast path passes its arguments on unconverted. If the native call refuses them, nothing has been computed, and the
general path repeats the call with converted arguments, or reports what is wrong in the caller's words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import tvm_ffi

from . import _core, _layout
from ._kinds import settled
from ._signature import ATTENTION, Signature, in_tail
from ._tensors import (
    BFLOAT16_NUMBER,
    DTYPE_CODES,
    LAST_NUMPY_TYPE,
    Array,
    bump,
    differentiable,
    empty_lse,
    empty_out,
    has_tangent,
    is_cupy,
    is_masked,
    is_torch,
    stored,
)

FUNC, CACHE, FORWARD = 0, 1, 2  # whose names the errors use: enum Face of bindings/signature.hpp
HEADS_FIRST = 4  # added to one: q, k, v and out are (num_seqs, heads, tokens, width); kHeadsFirst there

_ndarray, _empty = np.ndarray, np.empty
_BF16, _U16 = BFLOAT16_NUMBER, np.dtype(np.uint16)
_FOUR_BF16 = DTYPE_CODES["bfloat16"] * 0x1111  # stored_as of q, k, v and out
_NUMPY = frozenset({np.ndarray, type(None), int, bool})  # the types in a plain call's tail
CU_SEQLENS_Q, OUTPUT_SCALE = in_tail("cu_seqlens_q"), in_tail("output_scale")
FLOATS, _PAST_FLOATS = in_tail("sinks"), in_tail("rel_logits") + 1  # tensors that could have a gradient
_INDEX = {name: index for index, name in enumerate(ATTENTION.names)}
_STORED = ("q", "k", "v", "out", "sinks", "rel_logits")  # in the order of their bits in stored_as
_ZERO = 0  # a default, recognised by identity: a caller may pass an array, which `==` would compare by element


def rare_options(
    sinks: Array | None,
    alibi_slopes: Array | None,
    q_descale: Array | None,
    k_descale: Array | None,
    v_descale: Array | None,
    output_scale: Array | None,
    rel_logits: Array | None,
    causal_per_seq: Array | None,
    prefix_ranges: Array | None,
    prefix_clamp_window: bool,
    rswa_prefix_lens: Array | None,
    rswa_window: int,
    attention_chunk: int,
    check_device: bool,
) -> tuple[Any, ...]:
    """The second half of the tail (signature.def); empty where all of it has its defaults, as in most calls."""
    # fmt: off
    if (
        sinks is not None or alibi_slopes is not None or q_descale is not None or k_descale is not None
        or v_descale is not None or output_scale is not None or rel_logits is not None
        or causal_per_seq is not None or prefix_ranges is not None or rswa_prefix_lens is not None
        or rswa_window is not _ZERO or attention_chunk is not _ZERO or check_device is not False
        or prefix_clamp_window is not False
    ):
        return (
            sinks, alibi_slopes, q_descale, k_descale, v_descale, output_scale, rel_logits, causal_per_seq,
            prefix_ranges, prefix_clamp_window, rswa_prefix_lens, rswa_window, attention_chunk, check_device,
        )
    return ()
    # fmt: on


class _Torch:
    """The functions of torch that the fast path uses, looked up once torch is in use."""

    Tensor: Any = None

    def learn(self) -> None:
        torch = sys.modules["torch"]
        self.is_grad_enabled, self.empty_like, self.float32 = torch.is_grad_enabled, torch.empty_like, torch.float32
        try:  # much faster than the public function
            with torch.inference_mode():
                torch._C._increment_version((torch.empty(0),))
            self.increment_version = torch._C._increment_version
        except Exception:  # noqa: BLE001 - an older torch
            self.increment_version = lambda tensors: bump(*tensors)
        self.forward_ad = torch.autograd.forward_ad  # its _current_level: in_forward_mode(), without calls
        self.Parameter, self.Tensor = torch.nn.Parameter, torch.Tensor


TORCH = _Torch()


def learn_torch(x: Array) -> None:
    """Enables the fast paths for torch once x is a torch tensor."""
    if TORCH.Tensor is None and is_torch(x):
        TORCH.learn()


def call(function: Callable[..., Any], signature: Signature, args: tuple[Any, ...], face: int = 0) -> Any:
    """One native call. Arrays that NumPy refuses to export are exported another way, or reported."""
    # tvm-ffi finds out torch's current stream by itself, but not CuPy's.
    if "cupy" in sys.modules and (array := next(filter(is_cupy, args), None)) is not None:
        stream = sys.modules["cupy"].cuda.get_current_stream().ptr
        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", array.device.id), stream):
            return function(*args)
    try:
        return function(*args)
    except BufferError:
        names = signature.words[face]
        return function(*[_export(name, arg) for name, arg in zip(names, args)])


def _export(name: str, x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    try:
        # With the newer version of the protocol NumPy exports read-only arrays, too.
        return tvm_ffi.from_dlpack(x.__dlpack__(max_version=(1, 0)))
    except BufferError as error:
        text = f"{name}.dtype = {x.dtype}, strides {x.strides} bytes: cannot be passed without a copy ({error})"
    except RuntimeError as error:  # a type that DLPack cannot express
        text = f"{name}.dtype = {x.dtype}: {error}"
    if x.dtype.isnative and x.dtype.kind in "fiub" and x.dtype.num <= LAST_NUMPY_TYPE:
        raise ValueError(text)
    raise TypeError(text)


def as_torch_raises(error: MemoryError) -> Exception:
    """The error that torch would raise. Its allocator's errors arrive as MemoryError with C++ frames in the text."""
    text = str(error).partition("\nException raised from ")[0]
    if "CUDA" not in text:
        return error
    full = "out of memory" in text or "OUT_OF_MEMORY" in text  # torch's text, the driver's
    return sys.modules["torch"].cuda.OutOfMemoryError(text) if full else RuntimeError(text)


def loses_nothing(x: Array) -> bool:
    """Whether a torch tensor has its values in memory, and no derivative that a call past autograd would lose."""
    return (
        not x.is_neg()
        and not (x.requires_grad and TORCH.is_grad_enabled())
        and (TORCH.forward_ad._current_level < 0 or not has_tangent(x))
    )


def is_plain(x: Array) -> bool:
    """Whether x is a torch tensor that the fast path may pass on.

    The native call itself refuses everything else that a fast path must not take.
    """
    return type(x) is TORCH.Tensor and loses_nothing(x)


def is_direct(x: Any) -> bool:
    """Whether the native call takes a captured array as it is: it lies where it says, in a type that is exported."""
    if type(x) is _ndarray:
        return x.flags.writeable and x.dtype.num <= LAST_NUMPY_TYPE
    if TORCH.Tensor is None or (type(x) is not TORCH.Tensor and type(x) is not TORCH.Parameter):
        return False
    return loses_nothing(x)


class Mode(NamedTuple):
    """Options of `attend` that few calls use.

    explain: compute nothing, return the text. strict: copy nothing. spelled: the caller's name of an argument, by the
    function's own name, where the two differ.
    """

    explain: bool = False
    strict: bool = False
    spelled: Mapping[str, str] = MappingProxyType({})


_NO_MODE = Mode()


def attend(
    face: int,
    tensors: tuple[Array, Array, Array],
    out: Array | None,
    lse: Array | None,
    want_lse: bool,
    mode: Mode | None,
    head: tuple[Any, ...],
    tail: tuple[Any, ...],
    function: Callable[..., Any] = _core.attention_forward,
) -> Any:
    """Runs one problem; returns (out, lse), or the text that `mode` asks for.

    tensors: q, k, v. head, tail: the other arguments in signature.def's order; trailing ones of the tail may be left
    out.
    """
    q, k, v = tensors
    if mode:
        pass
    elif type(q) is type(k) is type(v) is _ndarray:
        if (
            ((number := q.dtype.num) <= LAST_NUMPY_TYPE or (number == _BF16 and k.dtype is v.dtype is q.dtype))
            and (not tail or (_NUMPY.issuperset(map(type, tail)) and len(tail) <= FLOATS))
            and (out is None or (type(out) is _ndarray and (number != _BF16 or out.dtype.num == _BF16)))
            and (lse is None or type(lse) is _ndarray)
        ):
            try:
                result, logs = out, lse
                if out is None:
                    shape, width = q.shape, v.shape[-1]
                    result = _empty(shape if shape[-1] == width else (*shape[:-1], width), q.dtype)
                if want_lse and lse is None:
                    logs = empty_lse(q, bool(tail) and tail[CU_SEQLENS_Q] is not None)
                if number == _BF16:
                    views = (q.view(_U16), k.view(_U16), v.view(_U16), result.view(_U16))
                    function(face, _FOUR_BF16, *views, logs, *head, *tail)
                else:
                    function(face, 0, q, k, v, result, logs, *head, *tail)
                return result, logs
            except Exception:  # noqa: BLE001, S110 - left to the general path
                pass
    elif (
        type(q) is type(k) is type(v) is TORCH.Tensor
        and not (q.is_neg() or k.is_neg() or v.is_neg())
        and not (TORCH.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and TORCH.forward_ad._current_level < 0
        and (out is None or is_plain(out))
        and (lse is None or is_plain(lse))
        and ("numpy.ma" not in sys.modules or not any(map(is_masked, tail)))
        and (len(tail) <= FLOATS or all(x is None or is_plain(x) for x in tail[FLOATS:_PAST_FLOATS]))
    ):
        try:
            if out is not None:
                result = out
            elif len(tail) <= FLOATS and q.shape[-1] == v.shape[-1] and q.itemsize > 1 and q.is_contiguous():
                result = TORCH.empty_like(q)
            else:
                result = empty_out(q, v, tail[OUTPUT_SCALE] if len(tail) > OUTPUT_SCALE else None)
            logs = lse
            if want_lse and lse is None:
                if tail and tail[CU_SEQLENS_Q] is not None:
                    rows, heads, _ = q.shape
                    shape = (heads, rows)
                else:
                    count, rows, heads, _ = q.shape
                    shape = (count, heads, rows)
                logs = q.new_empty(shape, dtype=TORCH.float32)
            function(face, 0, q, k, v, result, logs, *head, *tail)
        except MemoryError as error:
            raise as_torch_raises(error) from None
        except Exception:  # noqa: BLE001, S110 - left to the general path
            pass
        else:
            if out is not None:
                TORCH.increment_version((out,))
            if lse is not None:
                TORCH.increment_version((lse,))
            return result, logs
    mode = mode or _NO_MODE
    try:
        if _needs_gradients((*tensors, out, lse, *tail), function):
            return _autograd().attend(face, tensors, out, lse, want_lse, mode, head, tail, function)
        return _attend_any(face, (*tensors, out, lse, *head, *tail), want_lse, mode, function)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise respelled(error, mode.spelled) from None


@cache
def _autograd() -> Any:
    """The layer above this one, which needs torch: loaded when a gradient is first wanted."""
    return import_module("._autograd", __package__)


def _needs_gradients(given: tuple[Any, ...], function: Callable[..., Any]) -> bool:
    if "torch" not in sys.modules:
        return False
    return any(map(differentiable, given)) or any(map(differentiable, getattr(function, "captured", ())))


def _attend_any(
    face: int,
    values: tuple[Any, ...],
    want_lse: bool,
    mode: Mode,
    function: Callable[..., Any],
) -> Any:
    """The general path of `attend`. values: q, k, v, out, lse, the head and the tail."""
    learn_torch(values[0])
    args = settled(ATTENTION, face, (0, 0, *values))
    args[0] = face
    words, at = ATTENTION.words[face], _INDEX
    q, k, v, out, lse = (args[at[name]] for name in ("q", "k", "v", "out", "lse"))
    for name, x in (("q", q), ("k", k), ("v", v)):
        required(words[at[name]], x)
    given = (out, lse)
    if out is None:
        scale = at["output_scale"]
        out = empty_out(q, v, args[scale] if len(args) > scale else None)
    if want_lse and lse is None:
        cu_seqlens_q = at["cu_seqlens_q"]
        lse = empty_lse(q, len(args) > cu_seqlens_q and args[cu_seqlens_q] is not None)
    memory = out
    if not mode.strict:
        if args[at["softmax_scale"]] is None and len(q.shape) > 0 and q.shape[-1] > 0:
            args[at["softmax_scale"]] = q.shape[-1] ** -0.5  # by the head size before padding
        step = _layout.step_of(k)
        memory = _layout.writable(out, v.shape[-1] if len(v.shape) > 0 else 0, step)
        q, k, v = _layout.readable(q, step), _layout.readable(k, step), _layout.readable(v, step)
    args[at["q"]], args[at["k"]], args[at["v"]], args[at["out"]], args[at["lse"]] = q, k, v, memory, lse
    for bits, name in enumerate(_STORED):
        if at[name] < len(args) and args[at[name]] is not None:
            args[at[name]], code = stored(args[at[name]], bits)
            args[1] |= code
    if mode.explain:
        explain = function if function is not _core.attention_forward else _core.attention_explain
        return str(call(explain, ATTENTION, tuple(args), face))
    try:
        call(function, ATTENTION, tuple(args), face)
    except MemoryError as error:
        raise (as_torch_raises(error) if is_torch(q) else error) from None
    if function is not _core.attention_validate:
        _layout.hand_over(memory, out)
        bump(*given)
    return out, lse


def required(name: str, x: Array | None) -> None:
    if x is None:
        raise TypeError(f"{name} = None: must be a NumPy array, a torch tensor or another DLPack tensor")


def respelling(spelled: Mapping[str, str], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the function; errors have the caller's names."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise respelled(error, spelled) from None


def respelled(error: Exception, spelled: Mapping[str, str]) -> Exception:
    """The error with the caller's names: `sinks.shape[0] = 3 ..` becomes `s_aux.shape[0] = 3 ..`."""
    text = str(error)
    for name, word in spelled.items():
        if text.startswith(name) and not text[len(name) : len(name) + 1].isidentifier():
            return type(error)(word + text[len(name) :])
    return error
