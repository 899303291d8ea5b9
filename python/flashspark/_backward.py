"""Gradients of attention: from Python arguments to one native call, and the functions that give them to NumPy.

Calls on torch tensors that require gradients need none of these functions: torch's backward() comes here by itself
(flashspark._autograd).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from . import _core, _layout
from ._call import FLOATS, TORCH, Mode, as_torch_raises, call, is_plain, learn_torch, required, respelled
from ._kinds import settled
from ._ops import flash_attn_func, flash_attn_varlen_func
from ._signature import ATTENTION, BACKWARD, NO_TAIL, in_tail
from ._tensors import FLOAT32, Array, array, bump, empty_like, is_masked, is_torch, stored
from ._user_functions import Functions

_INDEX = {name: index for index, name in enumerate(ATTENTION.names)}
_STORED = ("q", "k", "v", "out", "sinks", "rel_logits")  # in the order of their bits in stored_as
_BOTH: Any = SimpleNamespace(words=tuple((*BACKWARD.words[0], *words) for words in ATTENTION.words))
_SCHEDULE = in_tail("scheduler_metadata")
# The arguments that have gradients, in the order in which `gradients` takes and gives them.
ARGUMENTS = ("q", "k", "v", "sinks", "rel_logits", "alibi_slopes")
_ROWS = len("qkv")
_QKV = ARGUMENTS[:_ROWS]
_ONLY_QKV = tuple(name in _QKV for name in ARGUMENTS)
_NAMES = frozenset((*ARGUMENTS, "aux_tensors"))


class Forward(NamedTuple):
    """A forward call and what it gave.

    extras: what follows the arguments of signature.def (flashspark._user_functions). captured: score_mod's tensors.
    """

    face: int
    tensors: tuple[Array, Array, Array]
    out: Array
    lse: Array
    head: tuple[Any, ...]
    tail: tuple[Any, ...]
    extras: tuple[Any, ...] = ()
    captured: Sequence[Array] = ()


def gradients(
    forward: Forward,
    dout: Array,
    dlse: Array | None,
    wanted: Sequence[bool],
    explain: bool = False,
    given: Sequence[Array | None] = (None, None, None),
) -> list[Array | None] | str:
    """The gradients of ARGUMENTS and then of score_mod's captured tensors, None where one is not wanted.

    Those of q, k and v have their types and layouts; the others are float32. explain: what would run, instead. given:
    memory for those of q, k and v.
    """
    face, (q, k, v) = forward.face, forward.tensors
    learn_torch(q)
    if not explain and (found := _direct(forward, dout, dlse, wanted, given)) is not None:
        return found
    given = [None if x is None else array(f"d{name}", x, written=True) for name, x in zip("qkv", given)]
    tail = [*forward.tail, *NO_TAIL[len(forward.tail) :]]
    tail[_SCHEDULE] = None
    args = settled(ATTENTION, face, (0, 0, q, k, v, None, None, *forward.head, *tail))
    args[0], words = face, ATTENTION.words[face]
    for name, x in (("out", forward.out), ("lse", forward.lse)):  # which are only read here
        args[_INDEX[name]] = array(words[_INDEX[name]], x)
    q, k, v, lse = (args[_INDEX[name]] for name in ("q", "k", "v", "lse"))
    for name, x in zip("qkv", (q, k, v)):
        required(words[_INDEX[name]], x)
    dout = array("dout", dout)
    if dlse is not None:  # which must have lse's strides
        dlse, lse = _layout.contiguous(array("dlse", dlse)), _layout.contiguous(lse)
        args[_INDEX["lse"]] = lse
    for name, want in zip(ARGUMENTS[_ROWS:], wanted[_ROWS:]):  # and these gradients have their arguments'
        if want and args[_INDEX[name]] is not None:
            args[_INDEX[name]] = _layout.contiguous(args[_INDEX[name]])
    if args[_INDEX["softmax_scale"]] is None and len(q.shape) > 0 and q.shape[-1] > 0:
        args[_INDEX["softmax_scale"]] = q.shape[-1] ** -0.5  # by the head size before padding
    step = _layout.step_of(k)
    made = [
        None if not want else _layout.beside(x, step) if into is None else _layout.writable(into, x.shape[-1], step)
        for x, want, into in zip((q, k, v), wanted, given)
    ]
    others = [args[_INDEX[name]] for name in ARGUMENTS[_ROWS:]]
    others += [array("captured tensor", x) for x in forward.captured]
    floats = [_floats_like(x) if want and x is not None else None for x, want in zip(others, wanted[_ROWS:])]
    for name in ("q", "k", "v", "out"):
        args[_INDEX[name]] = _layout.readable(args[_INDEX[name]], step)
    for bits, name in enumerate(_STORED):
        if args[_INDEX[name]] is not None:
            args[_INDEX[name]], code = stored(args[_INDEX[name]], bits)
            args[1] |= code
    rows = [None if x is None else stored(x, 0)[0] for x in (_layout.readable(dout, step), *made)]
    sinks, rel_logits, alibi_slopes, *captured = floats
    before = (rows[0], dlse, *rows[1:], sinks, rel_logits, alibi_slopes)
    native = _core.attention_backward_explain if explain else _core.attention_backward
    behind = (*forward.extras, *(captured if any(x is not None for x in captured) else ()))
    try:
        text = call(lambda *given: native(*given, *behind), _BOTH, (*before, *args), face)
    except MemoryError as error:
        raise (as_torch_raises(error) if is_torch(q) else error) from None
    if explain:
        return str(text)
    rows = [None if x is None else x[..., : of.shape[-1]] for x, of in zip(made, (q, k, v))]
    for i, (memory, into) in enumerate(zip(made, given)):
        if memory is not None and into is not None:
            _layout.hand_over(memory, into)
            bump(into)
            rows[i] = into
    return rows + floats


def _direct(
    forward: Forward, dout: Array, dlse: Array | None, wanted: Sequence[bool], given: Sequence[Array | None]
) -> list[Array | None] | None:
    """`gradients` of q, k and v, plain torch tensors that are passed on unconverted: no biases or dropout. None if the
    native call refuses them. Nothing has been computed then, and the general path copies, or says what is wrong."""
    face, (q, k, v), out, lse, head, tail, extras, captured = forward
    if (
        any(wanted[len(ARGUMENTS) :]) or len(tail) > FLOATS or (len(tail) > _SCHEDULE and tail[_SCHEDULE] is not None)
        or not (type(q) is type(k) is type(v) is type(dout) is type(out) is type(lse) is TORCH.Tensor)
        or q.is_neg() or k.is_neg() or v.is_neg() or dout.is_neg() or out.is_neg()
        or (
            TORCH.is_grad_enabled()
            and (
                q.requires_grad or k.requires_grad or v.requires_grad
                or dout.requires_grad or out.requires_grad or lse.requires_grad
            )
        )
        or TORCH.forward_ad._current_level >= 0
        or ("numpy.ma" in sys.modules and any(map(is_masked, tail)))
        or not all(x is None or is_plain(x) for x in given)
    ):  # fmt: skip
        return None
    try:
        rows = [
            None if not want else TORCH.empty_like(x) if into is None else into
            for x, want, into in zip((q, k, v), wanted, given)
        ]
        none = (None,) * (len(ARGUMENTS) - _ROWS)
        more = (*NO_TAIL[len(tail) :], *extras) if extras else ()
        _core.attention_backward(dout, dlse, *rows, *none, face, 0, q, k, v, out, lse, *head, *tail, *more)
    except MemoryError as error:
        raise as_torch_raises(error) from None
    except Exception:  # noqa: BLE001 - left to the general path
        return None
    bump(*given)
    return [*rows, *none, *[None] * len(captured)]


def _floats_like(x: Array) -> Array:
    """Contiguous memory in float32 of x's shape."""
    if is_torch(x):
        return x.new_empty(x.shape, dtype=sys.modules["torch"].float32)
    return empty_like(x, tuple(x.shape), FLOAT32)


class _Collected:
    """In place of `attend`: takes a call's arguments and computes nothing."""

    takes_functions = True

    def __call__(
        self,
        face: int,
        tensors: tuple[Array, Array, Array],
        out: Array,
        lse: Array,
        _: bool,
        mode: Mode | None,
        head: tuple[Any, ...],
        tail: tuple[Any, ...],
        functions: Functions | None = None,
    ) -> tuple[None, None]:
        self.mode, self.functions = mode or Mode(), functions
        self.forward = Forward(face, tensors, out, lse, head, tail)
        return None, None


def flash_attn_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    softmax_lse: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    rng_state: Array | tuple[int, int] | None = None,
    *,
    dlse: Array | None = None,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    wanted: Sequence[str] = ("q", "k", "v"),
    explain: bool = False,
    **options: Any,
) -> Any:
    """The gradients of flash_attn_func's arguments, from that of its result.

    dout: like out. q, k, v, dropout_p .. alibi_slopes and the keyword arguments in `options`: as flash_attn_func had
    them. out, softmax_lse: what it returned with return_softmax_lse. rng_state: dropout's, which must then be given.
    deterministic: the same bits on every run and for any number of threads; it is slower on a GPU.
    dlse: the gradient of softmax_lse, float32; None: 0. explain: return a text that says what would run and why.
    dq, dk, dv: written in place and returned; any strides. None: allocated.
    wanted: of "q", "k", "v", "sinks", "rel_logits", "alibi_slopes" and "aux_tensors".

    Returns the wanted gradients in that order: those of q, k and v in their type, "aux_tensors" a list with one for
    each tensor (None where score_mod does not read it, or where it holds integers), the others in float32. Raises what
    flash_attn_func raises, and NotImplementedError for a cache in pages, float8_e4m3 and output_scale.
    """
    collected = _Collected()
    flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        rng_state=_given(dropout_p, rng_state), out=out, lse=softmax_lse, _attend=collected, **options,
    )  # fmt: skip
    return _gradients(collected, dout, dlse, (dq, dk, dv), wanted, explain, options.get("aux_tensors"))


def flash_attn_varlen_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    softmax_lse: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    rng_state: Array | tuple[int, int] | None = None,
    *,
    dlse: Array | None = None,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    wanted: Sequence[str] = ("q", "k", "v"),
    explain: bool = False,
    **options: Any,
) -> Any:
    """flash_attn_backward of flash_attn_varlen_func's arguments. Rows of no sequence have gradients of 0."""
    collected = _Collected()
    flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, rng_state=_given(dropout_p, rng_state), out=out, lse=softmax_lse,
        _attend=collected, **options,
    )  # fmt: skip
    return _gradients(collected, dout, dlse, (dq, dk, dv), wanted, explain, options.get("aux_tensors"))


def _given(dropout_p: Any, rng_state: Any) -> Any:
    if rng_state is None and dropout_p is not None and dropout_p != 0:
        raise TypeError("rng_state = None: must be given with dropout_p, as the forward call had it")
    return rng_state


def _gradients(
    collected: _Collected,
    dout: Array,
    dlse: Array | None,
    memory: tuple[Array | None, ...],
    wanted: Sequence[str],
    explain: bool,
    aux: Any,
) -> Any:
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    forward, functions = collected.forward, collected.functions
    if wanted == _QKV and functions is None and not explain:
        return tuple(_called(collected, forward, dout, dlse, _ONLY_QKV, False, memory)[:_ROWS])
    for name in wanted:
        if name not in _NAMES:
            raise ValueError(f"wanted = {name!r}: must be of {', '.join(ARGUMENTS)}, aux_tensors")
    sources: tuple[int | None, ...] = ()
    if functions is not None:
        score = functions.traces()[0]
        if score is not None:
            sources = score.sources
        forward = forward._replace(extras=functions.extras(), captured=functions.captured)
    tensors = [
        "aux_tensors" in wanted and source is not None and _floating(x) for x, source in zip(forward.captured, sources)
    ]
    _require_arguments(forward, wanted)
    memory = tuple(x if name in wanted else None for name, x in zip("qkv", memory))
    which = [*(name in wanted for name in ARGUMENTS), *tensors]
    given = _called(collected, forward, dout, dlse, which, explain, memory)
    if explain:
        return given
    by_name: dict[str, Any] = dict(zip(ARGUMENTS, given))
    of_place = dict(zip(sources, given[len(ARGUMENTS) :]))
    by_name["aux_tensors"] = [of_place.get(place) for place in range(len(aux or ()))]
    results = tuple(by_name[name] for name in wanted)
    return results if len(results) != 1 else results[0]


def _called(
    collected: _Collected,
    forward: Forward,
    dout: Array,
    dlse: Array | None,
    wanted: Sequence[bool],
    explain: bool,
    memory: Sequence[Array | None],
) -> Any:
    """`gradients`, whose errors have the caller's names."""
    try:
        return gradients(forward, dout, dlse, wanted, explain, memory)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise respelled(error, {"lse": "softmax_lse", **collected.mode.spelled}) from None


def _require_arguments(forward: Forward, wanted: tuple[str, ...]) -> None:
    for name in set(wanted) & set(ARGUMENTS[_ROWS:]):
        place = in_tail(name)
        if len(forward.tail) <= place or forward.tail[place] is None:
            raise ValueError(f"wanted = {name!r}: must not name an argument that is not given")


def _floating(x: Array) -> bool:
    return str(x.dtype).rpartition(".")[2] in ("float16", "bfloat16", "float32", "float64")
