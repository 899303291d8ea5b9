"""Attention inside JAX programs: an XLA custom call, under jax.jit as well.

    from flashspark.jax import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True)  # (num_seqs, seqlen_q, num_heads, head_dim)

Needs the package jax-tvm-ffi (pip install jax-tvm-ffi), which passes XLA's buffers to the native function: nothing is
copied, and plain calls enter no Python. Calls with alibi_slopes, sinks or lengths, and gradients, pass through a few
lines of Python at run time and so need the interpreter's lock.

Tested on the CPU. On a GPU the same call is given XLA's stream by jax-tvm-ffi; that was never run.

jax.grad and jax.vjp give the gradients of q, k, v, alibi_slopes and sinks. Second derivatives and jax.vmap raise
NotImplementedError, the latter since num_seqs already is the batch; jax.jvp raises JAX's own TypeError. Sharded arrays
need jax.shard_map around the call, as every custom call does.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tvm_ffi

from . import _core
from ._kinds import any_flag, flag, integer, pair, real, window
from ._layout import MAX_HEAD_DIM, padded
from ._signature import ATTENTION, HEAD, NO_TAIL, TAIL, in_tail

Array = Any  # jax.Array, or a tracer of one

_TYPES = frozenset({"float32", "float16", "bfloat16"})
_STEP = 8  # head sizes are padded to multiples of it
# The options that the custom call passes on as attributes, in the order of the native arguments. An attribute cannot be
# None, so that they end before `implementation`, which has no counterpart here.
_END = ATTENTION.index("implementation")
_HEAD, _REST_OF_HEAD = ATTENTION.names[HEAD:_END], ATTENTION.fallbacks[_END:TAIL]
_OPTIONAL = ("alibi_slopes", "sinks", "seqused_q", "seqused_k")
_DIFFERENTIABLE = frozenset({"alibi_slopes", "sinks"})
_TARGET = "flashspark_attention"


@functools.cache
def _bridge() -> Any:
    try:
        import jax_tvm_ffi
    except ImportError as error:
        raise ImportError("flashspark.jax needs the package jax-tvm-ffi: pip install jax-tvm-ffi") from error
    return jax_tvm_ffi


def _with_optional(names: tuple[str, ...]) -> Any:
    """The native function for calls with some of the optional tensors, behind q, k and v."""
    places = [in_tail(name) for name in names]

    def function(face: int, stored_as: int, q: Any, k: Any, v: Any, *rest: Any) -> None:
        tensors, (out, lse, *head) = rest[: len(names)], rest[len(names) :]
        tail = list(NO_TAIL)
        for place, x in zip(places, tensors):
            tail[place] = x
        _core.attention_forward(face, stored_as, q, k, v, out, lse, *head, *_REST_OF_HEAD, *tail)

    return tvm_ffi.convert(function)


def _register(name: str, function: Any, platform: str, **more: Any) -> None:
    """Makes a function of the native calls' arguments known to XLA."""
    arguments = ["attrs.face", "attrs.stored_as", "args", "rets", *(f"attrs.{option}" for option in _HEAD)]
    try:
        _bridge().register_ffi_target(name, function, arguments, platform=platform, **more)
    except Exception as error:
        if "API version" not in str(error):
            raise
        bridge = f"jax-tvm-ffi {importlib.metadata.version('jax-tvm-ffi')}"
        mend = "update jax and jaxlib, or install an older jax-tvm-ffi"
        raise ImportError(f"{bridge} is built for another release of JAX than {jax.__version__}: {mend}") from error


@functools.cache
def _target(names: tuple[str, ...]) -> str:
    """The name of the custom call with these optional tensors, registered with XLA for CPUs and GPUs."""
    name = "_".join((_TARGET, *names))
    function = _with_optional(names) if names else _core.attention_forward
    _register(name, function, "cpu")
    # The bridge counts on a function that can be captured into a CUDA graph, which needs native code alone.
    _register(name, function, "gpu", allow_cuda_graph=not names)
    return name


def _backward_with_optional(names: tuple[str, ...]) -> Any:
    """The native gradients: of q, k and v, and of those of the optional tensors that have some."""
    places = [in_tail(name) for name in names]
    floats = [name for name in names if name in _DIFFERENTIABLE]

    def function(face: int, stored_as: int, q: Any, k: Any, v: Any, *rest: Any) -> None:
        tensors, (out, lse, dout, dlse, dq, dk, dv, *rest) = rest[: len(names)], rest[len(names) :]
        others, head = dict(zip(floats, rest)), rest[len(floats) :]
        tail = list(NO_TAIL)
        for place, x in zip(places, tensors):
            tail[place] = x
        gradients = (dout, dlse, dq, dk, dv, others.get("sinks"), None, others.get("alibi_slopes"))
        forward = (face, stored_as, q, k, v, out, lse, *head, *_REST_OF_HEAD, *tail)
        _core.attention_backward(*gradients, *forward)

    return tvm_ffi.convert(function)


@functools.cache
def _backward_target(names: tuple[str, ...]) -> str:
    """As _target, of the gradients."""
    name = "_".join((_TARGET, "backward", *names))
    for platform, more in (("cpu", {}), ("gpu", {"allow_cuda_graph": False})):
        _register(name, _backward_with_optional(names), platform, **more)
    return name


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses jax.vmap."""
    batch = jax.custom_batching.custom_vmap(function)

    @batch.def_vmap
    def refuse_vmap(*_: Any) -> Any:
        raise NotImplementedError(
            "jax.vmap of flashspark.jax.flash_attn_func: fold the mapped axis into num_seqs, q's, k's and v's first"
        )

    return batch


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, part of a first derivative, which refuses to be differentiated itself."""

    @jax.custom_jvp
    def once(*arrays: Array) -> Any:
        return function(*arrays)

    @once.defjvp
    def refuse_second(*_: Any) -> Any:
        raise NotImplementedError("a second derivative of flashspark.jax.flash_attn_func: its gradients have none")

    return once


@functools.lru_cache(maxsize=256)
def _call(names: tuple[str, ...], head: tuple[Any, ...]) -> Callable[..., Any]:
    """The custom call as a function of q, k, v and the optional tensors, with its gradients."""
    target, attributes = _target(names), dict(zip(_HEAD, head))
    attributes |= {"face": np.int64(0), "stored_as": np.int64(0)}
    floats = [place for place, name in enumerate(names, 3) if name in _DIFFERENTIABLE]

    @_refusing
    def forward(*arrays: Array) -> Any:
        q, _, v = arrays[:3]
        results = (
            jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype),
            jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32),
        )
        return jax.ffi.ffi_call(target, results)(*arrays, **attributes)

    @_refusing
    def backward(*arrays: Array) -> Any:
        results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3]]
        results += [jax.ShapeDtypeStruct(arrays[place].shape, jnp.float32) for place in floats]
        return jax.ffi.ffi_call(_backward_target(names), tuple(results))(*arrays, **attributes)

    @jax.custom_vjp
    def differentiable(*arrays: Array) -> Any:
        return forward(*arrays)

    def with_residuals(*arrays: Array) -> Any:
        results = _once(forward)(*arrays)
        return results, (arrays, results)

    def gradients(residuals: Any, cotangents: Any) -> Any:
        arrays, results = residuals
        found = _once(backward)(*arrays, *results, *cotangents)
        given = [*found[:3], *[None] * len(names)]
        for place, x in zip(floats, found[3:]):
            given[place] = x.astype(arrays[place].dtype)
        return tuple(given)

    differentiable.defvjp(with_residuals, gradients)
    return differentiable


def _check(name: str, x: Array, shape: tuple[int | None, ...], dtypes: frozenset[str], rule: str) -> None:
    """Raises TypeError or ValueError unless x is an array of this shape (None: any size) and one of these types."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} = {type(x).__name__}: must be a JAX or NumPy array")
    if len(x.shape) != len(shape) or any(want not in (None, size) for want, size in zip(shape, x.shape)):
        raise ValueError(f"{name}.shape = {tuple(x.shape)}: must be {rule}")
    if str(x.dtype) not in dtypes:
        raise TypeError(f"{name}.dtype = {x.dtype}: must be {', '.join(sorted(dtypes))}")


def _check_all(q: Array, k: Array, v: Array, optional: dict[str, Array]) -> None:
    """What JAX must know before it can compile the call. The native call checks the rest at run time."""
    _check("q", q, (None,) * 4, _TYPES, "(num_seqs, seqlen_q, num_heads, head_dim)")
    own = frozenset({str(q.dtype)})
    _check("k", k, (q.shape[0], None, None, q.shape[3]), own, "(num_seqs, seqlen_k, num_heads_kv, head_dim)")
    _check("v", v, (*k.shape[:3], None), own, "(num_seqs, seqlen_k, num_heads_kv, its own head_dim)")
    heads, heads_kv = q.shape[2], k.shape[2]
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(f"q.shape[2] = {heads}: must be a multiple of k's, {heads_kv}")
    for name, x in (("q", q), ("v", v)):
        if not 0 < x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}.shape[3] = {x.shape[3]}: must be 1 to {MAX_HEAD_DIM}")
    for name, x in optional.items():
        if name.startswith("seqused"):
            _check(name, x, (q.shape[0],), frozenset({"int32"}), "(num_seqs,)")
        elif name == "sinks":
            _check(name, x, (heads,), _TYPES, "(num_heads,)")
        else:
            shape = (heads,) if len(getattr(x, "shape", ())) == 1 else (q.shape[0], heads)
            _check(name, x, shape, frozenset({"float32"}), "(num_heads,) or (num_seqs, num_heads)")


def _widened(x: Array) -> Array:
    """x with its head size padded by zeros to what the native call takes."""
    extra = padded(x.shape[3], _STEP) - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))) if extra else x


def _side(name: str, side: int | None) -> int:
    return -1 if side is None else window(name, side)


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    *,
    sinks: Array | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of a batch of sequences of the same length, as flashspark.flash_attn_func.

    q: (num_seqs, seqlen_q, num_heads, head_dim). k: (num_seqs, seqlen_k, num_heads_kv, head_dim). v: like k, with a
    head size of its own. float32, float16 or bfloat16; head sizes up to 512, copied and padded at every call unless
    they are multiples of 8.
    dropout_p: must be 0. softmax_scale: None: head_dim ** -0.5.
    causal, window_size, softcap: as in flashspark.flash_attn_func; the last query sees every key.
    alibi_slopes: float32 (num_heads,) or (num_seqs, num_heads). sinks: (num_heads,) float32, float16 or bfloat16.
    seqused_q, seqused_k: int32 (num_seqs,): rows and keys in use. Result rows past seqused_q hold anything, and have no
    gradients.
    deterministic: also of gradients.
    Arrays may be traced; all other arguments must be Python numbers.

    Returns out (num_seqs, seqlen_q, num_heads, head_dim of v) in q's type, or (out, lse) with return_softmax_lse: lse
    float32 (num_seqs, num_heads, seqlen_q).

    Raises ValueError (a shape or number breaks its rule) and TypeError (a type) when it is called or traced,
    NotImplementedError for jax.vmap, second derivatives and dropout, ImportError without jax-tvm-ffi. What values alone
    show, as a length out of range, or what no implementation supports is an error of XLA's at run time, with our text.
    """
    if dropout_p is not None and real("dropout_p", dropout_p) != 0:
        raise NotImplementedError(f"dropout_p = {dropout_p!r}: must be 0 in flashspark.jax")
    given = dict(zip(_OPTIONAL, (alibi_slopes, sinks, seqused_q, seqused_k)))
    optional = {name: x for name, x in given.items() if x is not None}
    _check_all(q, k, v, optional)
    left, right = pair(window_size)
    options = {
        "softmax_scale": np.float64(
            q.shape[3] ** -0.5 if softmax_scale is None else real("softmax_scale", softmax_scale)
        ),
        "causal": flag("causal", causal),
        "window_left": np.int64(_side("window_size[0]", left)),
        "window_right": np.int64(_side("window_size[1]", right)),
        "softcap": np.float64(real("softcap", softcap)),
        "num_splits": np.int64(integer("num_splits", num_splits)),
        "deterministic": flag("deterministic", deterministic),
    }
    head = tuple(options[name] for name in _HEAD)
    width = v.shape[3]
    out, lse = _call(tuple(optional), head)(*(_widened(x) for x in (q, k, v)), *optional.values())
    out = out[..., :width] if out.shape[3] != width else out
    return (out, lse) if any_flag(return_softmax_lse=return_softmax_lse) else out
