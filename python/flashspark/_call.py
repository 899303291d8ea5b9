"""From Python arguments to one native call: result allocation, types that DLPack lacks, read-only arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import tvm_ffi

from . import _core

Array = Any  # numpy.ndarray, torch.Tensor or another DLPack producer

FUNC, CACHE, FORWARD = 0, 1, 2  # whose names the errors use; see bindings/names.hpp

_FLOAT32 = np.dtype(np.float32)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# NumPy's own types have small numbers; ml_dtypes' are registered above them, and NumPy's DLPack refuses those. They
# cross as integers of their width, with a flashspark_dtype beside them.
_LAST_NUMPY_TYPE = np.dtype(np.float16).num
_STORED = {_BFLOAT16.num: (np.dtype(np.uint16), 3), _E4M3.num: (np.dtype(np.uint8), 4)}

# Arguments of attention_forward, in order; the native reader takes them by position.
ATTENTION_ARGUMENTS = (
    *("face", "stored_as", "q", "k", "v", "out", "lse", "softmax_scale", "causal", "window_left", "window_right"),
    *("softcap", "num_splits", "deterministic", "implementation", "num_threads", "cu_seqlens_q", "max_seqlen_q"),
    *("cu_seqlens_k", "max_seqlen_k", "seqused_q", "seqused_k", "block_table", "leftpad_k", "kv_batch_index", "sinks"),
    *("alibi_slopes", "q_descale", "k_descale", "v_descale", "output_scale", "rel_logits", "causal_per_seq"),
    *("prefix_ranges", "prefix_clamp_window", "rswa_prefix_lens", "rswa_window", "scheduler_metadata"),
)
_TAIL = ATTENTION_ARGUMENTS.index("num_threads") + 1
CU_SEQLENS_Q, SINKS, OUTPUT_SCALE, REL_LOGITS = (
    ATTENTION_ARGUMENTS.index(name) - _TAIL for name in ("cu_seqlens_q", "sinks", "output_scale", "rel_logits")
)
APPEND_ARGUMENTS = (
    *("stored_as", "k", "v", "k_cache", "v_cache", "q", "rotary_cos", "rotary_sin", "cache_seqlens"),
    *("cu_seqlens_k_new", "block_table", "cache_batch_idx", "cache_leftpad", "rotary_interleaved"),
    *("q_rotary_per_token", "k_descale", "v_descale", "slot_mapping", "rotary_positions"),
)
_WRITTEN = frozenset({"out", "lse", "k_cache", "v_cache"})


def is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_cupy(x: object) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def stored(x: Array, place: int, name: str) -> tuple[Array, int]:
    """`x` in a type that DLPack knows, and its four bits of the `stored_as` argument."""
    if isinstance(x, np.ndarray):
        number = x.dtype.num
        if number > _LAST_NUMPY_TYPE and number in _STORED:
            integer, code = _STORED[number]
            return x.view(integer), code << 4 * place
    elif is_torch(x):
        if x.requires_grad:
            x = _without_grad(x, name)
        if not (x.is_cpu or x.is_cuda):
            raise NotImplementedError(f"{name}.device = {x.device}: must be the CPU or a CUDA device")
        if x.dtype.itemsize == 1 and x.dtype is sys.modules["torch"].float8_e4m3fn:
            return x.view(sys.modules["torch"].uint8), 4 << 4 * place
    return x, 0


def _without_grad(x: Array, name: str) -> Array:
    if sys.modules["torch"].is_grad_enabled():
        raise ValueError(
            f"{name}.requires_grad = True: must be False, or call under torch.no_grad(): "
            "flashspark computes inference only"
        )
    return x.detach()


def empty_like(x: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array of x's kind and device. `dtype` is NumPy's or torch's; see out_dtype."""
    if isinstance(x, np.ndarray):
        return np.empty(shape, dtype)
    if is_torch(x):
        return x.new_empty(shape, dtype=dtype)
    if is_cupy(x):
        with x.device:
            return sys.modules["cupy"].empty(shape, dtype)
    raise TypeError(
        f"q = {type(x).__name__}: results are allocated for NumPy and CuPy arrays and torch tensors; "
        "give out= (and lse=)"
    )


def int32_full(x: Array, count: int, value: int) -> Array:
    if is_torch(x):
        return x.new_full((count,), value, dtype=sys.modules["torch"].int32)
    if is_cupy(x):
        with x.device:
            return sys.modules["cupy"].full(count, value, np.int32)
    return np.full(count, value, np.int32)


def out_dtype(q: Array, output_scale: Array | None) -> Any:
    """q's type; bfloat16 when q is e4m3, unless output_scale asks for e4m3."""
    dtype = q.dtype
    if is_torch(q):
        torch = sys.modules["torch"]
        if output_scale is not None:
            return torch.float8_e4m3fn
        return torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype
    if output_scale is not None:
        return _E4M3
    return _BFLOAT16 if dtype == _E4M3 else dtype


def empty_out(q: Array, v: Array, output_scale: Array | None) -> Array:
    if not isinstance(q, np.ndarray) and not is_torch(q) and not is_cupy(q):
        empty_like(q, (), None)  # raises, naming q
    if not hasattr(v, "shape"):
        raise TypeError(f"v = {type(v).__name__}: must be a NumPy array, a torch tensor or another DLPack tensor")
    return empty_like(q, (*q.shape[:-1], *v.shape[-1:]), out_dtype(q, output_scale))


def empty_lse(q: Array, varlen: bool) -> Array | None:
    """float32 (num_heads, total_q) or (num_seqs, num_heads, seqlen_q). None for a q that the call will refuse."""
    shape = tuple(q.shape)
    if len(shape) != (3 if varlen else 4):
        return None
    float32 = sys.modules["torch"].float32 if is_torch(q) else _FLOAT32
    return empty_like(q, (shape[1], shape[0]) if varlen else (shape[0], shape[2], shape[1]), float32)


def call(function: Callable[..., Any], names: tuple[str, ...], args: tuple[Any, ...]) -> Any:
    """One native call. NumPy refuses to export some arrays at first; those are sorted out only then."""
    # tvm-ffi asks torch for its current stream, but not CuPy.
    if "cupy" in sys.modules and (array := next(filter(is_cupy, args), None)) is not None:
        stream = sys.modules["cupy"].cuda.get_current_stream().ptr
        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", array.device.id), stream):
            return function(*args)
    try:
        return function(*args)
    except BufferError:
        return function(*[_export(name, arg) for name, arg in zip(names, args)])


def _export(name: str, x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    if not x.flags.writeable and name in _WRITTEN:
        raise ValueError(f"{name} = read-only array: must be writable")
    try:
        # Asked for the newer protocol, NumPy exports read-only arrays, too.
        return tvm_ffi.from_dlpack(x.__dlpack__(max_version=(1, 0)))
    except BufferError as error:
        text = f"{name}.dtype = {x.dtype}, strides {x.strides} bytes: cannot be passed without a copy ({error})"
    except RuntimeError as error:  # a type that DLPack has no code for
        text = f"{name}.dtype = {x.dtype}: {error}"
    if x.dtype.isnative and x.dtype.kind in "fiub" and x.dtype.num <= _LAST_NUMPY_TYPE:
        raise ValueError(text)
    raise TypeError(text)


def _as_torch_raises(error: MemoryError) -> Exception:
    """Whatever goes wrong in torch's allocator arrives as a MemoryError with torch's C++ frames in its text."""
    text = str(error).partition("\nException raised from ")[0]
    if "CUDA" not in text:
        return error
    full = "out of memory" in text or "OUT_OF_MEMORY" in text  # torch's words, the driver's
    return sys.modules["torch"].cuda.OutOfMemoryError(text) if full else RuntimeError(text)


def _has_grad(x: Array | None) -> bool:
    return x is not None and getattr(x, "requires_grad", False)


def attend(
    face: int,
    tensors: tuple[Array, Array, Array],
    out: Array | None,
    lse: Array | None,
    want_lse: bool,
    explain: bool,
    head: tuple[Any, ...],
    tail: tuple[Any, ...],
    function: Callable[..., Any] = _core.attention_forward,
) -> Any:
    """Runs one problem; returns (out, lse), or the text of `explain`.

    tensors: q, k, v. head: softmax_scale .. num_threads of ATTENTION_ARGUMENTS. tail: the rest, () when all are None.
    """
    q, k, v = tensors
    if not tail and not explain and type(q) is np.ndarray and type(v) is np.ndarray and q.dtype.num <= _LAST_NUMPY_TYPE:
        # The common case, for the sake of small problems: the general one below takes 3 us more.
        if out is None:
            out = np.empty(q.shape[:-1] + v.shape[-1:], q.dtype)
        if want_lse and lse is None:
            lse = empty_lse(q, False)
        try:
            function(face, 0, q, k, v, out, lse, *head)
            return out, lse
        except BufferError:
            pass
    elif (
        not explain
        and (torch := sys.modules.get("torch")) is not None
        and type(q) is type(k) is type(v) is torch.Tensor
        and (dtype := q.dtype) is k.dtype
        and dtype.itemsize > 1
        and (not tail or tail[SINKS] is tail[REL_LOGITS] is tail[OUTPUT_SCALE] is None)
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or _has_grad(out)))
    ):
        # The same for torch, where a call on a GPU takes as long as a small kernel. The native reader asks the rest.
        if out is None:
            same = q.is_contiguous() and v.dim() > 0 and v.size(-1) == q.size(-1)
            out = torch.empty_like(q) if same else empty_out(q, v, None)
        if want_lse and lse is None:
            lse = empty_lse(q, bool(tail) and tail[CU_SEQLENS_Q] is not None)
        try:
            function(face, 0, q, k, v, out, lse, *head, *tail)
            return out, lse
        except MemoryError as error:
            raise _as_torch_raises(error) from None
        except Exception:  # noqa: BLE001, S110 - the general way says what is wrong, or mends it
            pass
    if out is None:
        out = empty_out(q, v, tail[OUTPUT_SCALE] if tail else None)
    if want_lse and lse is None:
        lse = empty_lse(q, bool(tail) and tail[CU_SEQLENS_Q] is not None)
    (q, q_as), (k, k_as), (v, v_as), (passed_out, out_as) = (
        stored(q, 0, "q"),
        stored(k, 1, "k"),
        stored(v, 2, "v"),
        stored(out, 3, "out"),
    )
    stored_as = q_as | k_as | v_as | out_as
    if tail:
        (sinks, sinks_as), (rel_logits, rel_as) = (
            stored(tail[SINKS], 4, "sinks"),
            stored(tail[REL_LOGITS], 5, "rel_logits"),
        )
        tail = (*tail[:SINKS], sinks, *tail[SINKS + 1 : REL_LOGITS], rel_logits, *tail[REL_LOGITS + 1 :])
        stored_as |= sinks_as | rel_as
    args = (face, stored_as, q, k, v, passed_out, lse, *head, *tail)
    if explain:
        return str(call(_core.attention_explain, ATTENTION_ARGUMENTS, args))
    try:
        call(function, ATTENTION_ARGUMENTS, args)
    except MemoryError as error:
        raise (_as_torch_raises(error) if is_torch(q) else error) from None
    return out, lse


def window(window_size: Any) -> tuple[int | None, int | None]:
    """(left, right) from flash-attention's window_size; None stands for an open side."""
    if window_size is None:
        return None, None
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"window_size = {window_size!r}: must be (left, right), -1 or None for an open side") from None
    return left, right


def refuse_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(f"dropout_p = {dropout_p!r}: must be 0, flashspark has no dropout: it computes inference only")
