"""flashspark as operators of torch, which torch.compile keeps in one graph. Importing this module registers them.

    from flashspark.torch_ops import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, append_kv

and flash-attention's packed forms of the first two.

These take and return what the package's functions of the same names do, for torch tensors, with gradients where those
have them. Outside torch.compile the package's own functions have less overhead. Fake and meta tensors give results of
the right shapes and types, without memory. Two differences: `explain` is not offered, and flash_attn_with_kvcache
checks the attention's arguments only after it has written the new rows into the cache.

The operators are flashspark::attention, which returns (out, lse), flashspark::attention_backward, its gradients,
flashspark::attention_out, which fills given tensors, and flashspark::append_kv. Their arguments are those of
bindings/signature.def, in its order; `face` says whose names errors use. Calls with score_mod, mask_mod or
block_sparse_tensors have operators of their own (_torch_functions.py). A tensor that requires gradients raises
ValueError where none is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import is_
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import _cache, _call, _core, _ops, _packed, _torch_functions
from ._autograd import Problem, below_transforms, refuse
from ._backward import ARGUMENTS, Forward, gradients
from ._kinds import KINDS, any_flag, one_spelling
from ._layout import padded
from ._signature import APPEND, ATTENTION, HEAD, NO_TAIL, REQUIRED, TENSORS, Signature, in_tail
from ._tensors import held, in_forward_mode, out_dtype, refuse_tangents

_NAMES = ATTENTION.names[HEAD:]  # the options, which follow q, k, v, out and lse
_KINDS, _FALLBACKS = ATTENTION.kinds[HEAD:], ATTENTION.fallbacks[HEAD:]
_HEAD = len(_NAMES) - len(NO_TAIL)
_FIRST = ATTENTION.index("q")
_STEP = 8  # head sizes are padded to multiples of it
_DROPOUT = in_tail("dropout_p")  # and rng_state: the last two
_TYPES = {
    **{"integer": "SymInt", "bound": "SymInt", "window": "SymInt"},
    **{"real": "float", "flag": "bool", "text": "str"},
}


def _schema(signature: Signature, first: int, defaults: bool) -> str:
    """The arguments from `first` on, as torch.library declares them. Each written one gets a letter of its own."""
    declared = []
    for kind, name, fallback in list(zip(signature.kinds, signature.names, signature.fallbacks))[first:]:
        letter = f"({chr(ord('a') + len(declared))}!)" if kind == "result" else ""
        word = f"Tensor{letter}" if kind in TENSORS else _TYPES[kind]
        optional = "?" if fallback is None else ""
        default = f"={fallback}" if defaults and fallback is not REQUIRED else ""
        declared.append(f"{word}{optional} {name}{default}")
    return ", ".join(declared)


_GIVEN = f"Tensor q, Tensor k, Tensor v, {_schema(ATTENTION, HEAD, False)}"
NAMESPACE = __name__.partition(".")[0]  # the Hugging Face loader imports the package under another name
_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"attention({_GIVEN}, bool want_lse, int face=0, bool strict=False) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_GIVEN}, bool[] wanted, int face=0) -> ("
    + ", ".join(["Tensor"] * len(ARGUMENTS))
    + ")"
)
_library.define(f"attention_out({_GIVEN}, Tensor(a!) out, Tensor(b!)? lse, int face=0, bool strict=False) -> ()")
_library.define(f"append_kv({_schema(APPEND, 1, True)}, bool strict=False) -> ()")
_operators = getattr(torch.ops, NAMESPACE)


# torch leaves out trailing arguments that have their defaults: face and strict, and most of append_kv's.


def _attention(q, k, v, *rest):
    options, (want_lse, *more) = rest[: len(_NAMES)], rest[len(_NAMES) :]
    out, lse = _results((q, k, v), options, want_lse, *more)
    _compute((q, k, v), options, out, lse if want_lse else None, *more)
    return out, lse


def _attention_out(q, k, v, *rest):
    options, (out, lse, *more) = rest[: len(_NAMES)], rest[len(_NAMES) :]
    _compute((q, k, v), options, out, lse, *more)


def _compute(tensors, options, out, lse, face=0, strict=False, function=_core.attention_forward):
    head, tail = options[:_HEAD], options[_HEAD:]
    if not tail[_DROPOUT] and tail[_DROPOUT + 1] is None:  # a float from torch is never the default itself
        tail = tail[:_DROPOUT]
    if all(map(is_, tail, NO_TAIL)):
        tail = ()
    mode = _call.Mode(strict=True) if strict else None
    _call.attend(face, tensors, out, lse, False, mode, head, tail, function)


def _fake_attention(q, k, v, *rest):
    options, (want_lse, *more) = rest[: len(_NAMES)], rest[len(_NAMES) :]
    _same_device((q, k, v, *options), _words(*more[:1]))
    return _results((q, k, v), options, want_lse, *more)


def _fake_attention_out(q, k, v, *rest):
    options, (out, lse, *more) = rest[: len(_NAMES)], rest[len(_NAMES) :]
    _same_device((q, k, v, *options, out, lse), (*_words(*more[:1]), "out", "lse"))


def _fake_append(*args):
    _same_device(args, APPEND.words[0][1:])


def _words(face: int = 0) -> tuple[str, ...]:
    """A face's names of q, k, v and the options."""
    return (*ATTENTION.words[face][_FIRST : _FIRST + 3], *ATTENTION.words[face][HEAD:])


def _same_device(args: Iterable[Any], names: Iterable[str]) -> None:
    """Refuses tensors on several devices, as the real kernels do: also meta tensors beside ones with memory."""
    first = None
    for name, x in zip(names, args):
        if not isinstance(x, torch.Tensor):
            continue
        if first is None:
            first = x, name
        elif x.device != first[0].device:
            raise ValueError(f"{name}.device = {x.device}: must be the device of {first[1]}, {first[0].device}")


def _results(tensors, options, want_lse, face=0, _strict=False):
    """Uninitialised out and lse; an lse that is not wanted has no elements."""
    (q, k, v), words = tensors, _words(face)
    varlen = options[_HEAD + _call.CU_SEQLENS_Q] is not None
    for name, x, dimensions in ((words[0], q, (3,) if varlen else (4,)), (words[1], k, (3, 4)), (words[2], v, (3, 4))):
        if x.dim() not in dimensions:
            raise ValueError(
                f"{name}.shape = {tuple(x.shape)}: must be of {' or '.join(map(str, dimensions))} dimensions"
            )
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype(q, options[_HEAD + _call.OUTPUT_SCALE]))
    shape: tuple[Any, ...] = (0,)
    if want_lse:
        shape = (q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(shape, dtype=torch.float32)


def _attention_backward(dout, dlse, out, lse, q, k, v, *rest):
    options, (wanted, *more) = rest[: len(_NAMES)], rest[len(_NAMES) :]
    face = more[0] if more else 0
    forward = Forward(face, (q, k, v), out, lse, options[:_HEAD], options[_HEAD:])
    return tuple(_found_gradients(forward, dout, dlse, wanted))


def _found_gradients(forward, dout, dlse, wanted):
    """_backward.gradients, with an empty tensor in place of one that is not wanted."""
    empty = forward.tensors[0].new_empty
    found = gradients(forward, dout, dlse, wanted)
    return [empty(0) if x is None else x.contiguous() if x.dim() and x.shape[-1] % _STEP else x for x in found]


def _fake_attention_backward(dout, dlse, out, lse, q, k, v, *rest):
    options, (wanted, *_) = rest[: len(_NAMES)], rest[len(_NAMES) :]
    return tuple(_fake_gradients((q, k, v), options, wanted))


def _fake_gradients(tensors, options, wanted, captured=()):
    """Uninitialised gradients of ARGUMENTS and of what score_mod captures."""
    arguments = (*tensors, *(options[_HEAD + in_tail(name)] for name in ARGUMENTS[3:]), *captured)
    q, made = tensors[0], []
    for i, (x, want) in enumerate(zip(arguments, wanted)):
        if not want:
            made.append(q.new_empty(0))
        elif i < 3:
            made.append(torch.empty_like(x) if padded(x.shape[-1], _STEP) == x.shape[-1] else x.new_empty(x.shape))
        else:
            made.append(x.new_empty(x.shape, dtype=torch.float32))
    return made


class _OnOperators(Problem):
    """A call whose passes are operators, which torch.compile keeps in its graphs."""

    def forward(self, tensors):
        (q, k, v), tail, *_ = self.parts(tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return _operators.attention(q, k, v, *self.head, *tail, True, self.face, self.mode is not None)

    def backward(self, wanted, dout, dlse, tensors, out, lse):
        (q, k, v), tail, *_ = self.parts(tensors)
        return _operators.attention_backward(dout, dlse, out, lse, q, k, v, *self.head, *tail, wanted, self.face)


def _differentiable_attention(q, k, v, *rest):
    """The kernel of flashspark::attention for autograd. With gradients lse is computed even if it is not wanted."""
    options, (_, face, strict) = rest[: len(_NAMES)], (*rest[len(_NAMES) :], 0, False)[:3]
    tensors = [x for x in (q, k, v, *options) if isinstance(x, torch.Tensor)]
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            return _operators.attention(q, k, v, *rest)
    refuse(face, (q, k, v, None, None, *options))
    mode = _call.Mode(strict=strict)
    return below_transforms(_OnOperators(face, (q, k, v), mode, options[:_HEAD], options[_HEAD:]), *tensors)


def _append(*args):
    _cache.append_kv(**dict(zip((*APPEND.names[1:], "strict"), args)))


def _without_tangents(kernel: Callable[..., Any], words: Callable[[tuple[Any, ...]], Iterable[str]]) -> Any:
    """An operator's kernel for autograd, before which tangents are refused: below it torch.func's are not seen."""

    def checked(*args):
        if in_forward_mode():
            refuse_tangents(words(args), args)
        return kernel(*args)

    return checked


def _refuses_gradients(operator: Callable[..., Any], words: Callable[[tuple[Any, ...]], Iterable[str]]) -> Any:
    """The operator's kernel for autograd where no gradient is computed: no derivative must be lost silently."""

    def kernel(*args):
        if torch.is_grad_enabled():
            for name, x in zip(words(args), args):
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    raise ValueError(
                        f"{name}.requires_grad = True: must be False, or call under torch.no_grad(): "
                        "no gradient is computed for it"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return _without_tangents(kernel, words)


def _resolves(operator: Any, words: Callable[[tuple[Any, ...]], Iterable[str]]) -> Any:
    """The operator's kernel for lazily negated or zero tensors. torch's own fallback does not accept None."""
    written = [argument.is_write for argument in operator._schema.arguments]

    def kernel(*args):
        resolved = []
        for name, x, into in zip(words(args), args, written):
            lazy = isinstance(x, torch.Tensor) and (x.is_neg() or x._is_zerotensor())
            if lazy and into:
                raise ValueError(f"{name} = lazily negated or zero tensor: must hold its values in memory")
            resolved.append(held(x) if lazy else x)
        return operator(*resolved, *args[len(resolved) :])

    return kernel


def _attention_words(others: tuple[str, ...]) -> Callable[[tuple[Any, ...]], Iterable[str]]:
    """A function that names a call's arguments; `others` are those between the options and face."""
    first = 3 + len(_NAMES) + len(others)
    return lambda args: (*_words(args[first] if len(args) > first else 0), *others)


def _register(
    name: str,
    kernel: Any,
    fake: Any,
    words: Callable[[tuple[Any, ...]], Iterable[str]],
    differentiable: Callable[..., Any] | None = None,
) -> None:
    # The last key is for all other backends (sparse, quantized ..), whose tensors the kernel refuses by name.
    for device in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    operator = getattr(_operators, name).default
    autograd = _without_tangents(differentiable, words) if differentiable else _refuses_gradients(operator, words)
    _library.impl(name, autograd, "Autograd")
    for lazily in ("Negative", "ZeroTensor"):
        _library.impl(name, _resolves(operator, words), lazily)


_register("attention", _attention, _fake_attention, _attention_words(("want_lse",)), _differentiable_attention)
_register(
    *("attention_backward", _attention_backward, _fake_attention_backward),
    lambda args: ("dout", "dlse", "out", "lse", *_words(args[-1] if isinstance(args[-1], int) else 0)),
)
_register("attention_out", _attention_out, _fake_attention_out, _attention_words(("out", "lse")))
_register("append_kv", _append, _fake_append, lambda _: APPEND.words[0][1:])


def _refuse_a_mixture(words: Iterable[str], values: Iterable[Any]) -> None:
    """Refuses fake tensors beside real ones. torch's own error would not name the argument."""
    tensors = [(word, x) for word, x in zip(words, values) if isinstance(x, torch.Tensor)]
    fakes = [isinstance(x, FakeTensor) for _, x in tensors]
    if any(fakes) and not all(fakes):
        word, other = tensors[fakes.index(True)][0], tensors[fakes.index(False)][0]
        raise TypeError(f"{word} = FakeTensor: must be a tensor with memory, as {other} is")


def _settled(
    kinds: Iterable[str], words: tuple[str, ...], fallbacks: Iterable[Any], values: Iterable[Any]
) -> list[Any]:
    """The values as the operators' schemas want them. Raises TypeError or ValueError, which name the argument."""
    result: list[Any] = []
    for kind, word, fallback, value in zip(kinds, words, fallbacks, values):
        if value is None and fallback is not REQUIRED:
            result.append(fallback)
        elif kind not in TENSORS:
            result.append(KINDS[kind](word, value))
        elif not isinstance(value, torch.Tensor):
            raise TypeError(f"{word} = {'None' if value is None else type(value).__name__}: must be a torch tensor")
        elif value.layout is not torch.strided or value.is_nested:
            raise TypeError(f"{word}.layout = {value.layout}: must be torch.strided and not nested")
        elif value.is_quantized:
            raise TypeError(f"{word}.dtype = {value.dtype}: must be a plain type")
        else:
            result.append(value)
    if not torch.compiler.is_compiling():
        _refuse_a_mixture(words, result)
    return result


def _attend(
    face: int,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    want_lse: bool,
    mode: _call.Mode | None,
    head: tuple[Any, ...],
    tail: tuple[Any, ...],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """_call.attend, through the operators."""

    def operator(settled, out, lse, want_lse, strict):
        if out is None and lse is None:
            return _operators.attention(*settled, want_lse, face, strict)
        _operators.attention_out(*settled, out, lse, face, strict)
        return out, lse

    return _through(operator, face, tensors, out, lse, want_lse, mode, head, tail)


def _through(operator, face, tensors, out, lse, want_lse, mode, head, tail):
    """Settles a call's arguments for an operator(settled ones, out, lse, want_lse, strict), and allocates what is not
    given where the caller gives a part of the results."""
    explain, strict, spelled = mode or (False, False, {})
    if explain:
        raise ValueError("explain = True: must be False in flashspark.torch_ops; use the package's own function")
    values = (*tensors, out, lse, *head, *tail, *NO_TAIL[len(tail) :])
    fallbacks = (REQUIRED, REQUIRED, REQUIRED, None, None, *_FALLBACKS)
    try:
        q, k, v, out, lse, *options = _settled(
            ATTENTION.kinds[_FIRST:], ATTENTION.words[face][_FIRST:], fallbacks, values
        )
        if out is not None or lse is not None:
            empty_out, empty_lse = _results((q, k, v), options, want_lse, face)
            out = empty_out if out is None else out
            lse = empty_lse if lse is None and want_lse else lse
            return operator((q, k, v, *options), out, lse, want_lse, strict)
        out, lse = operator((q, k, v, *options), None, None, want_lse, strict)
        return out, lse if want_lse else None
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _call.respelled(error, spelled) from None


_attend.with_functions = _torch_functions.register(
    _torch_functions.Base(
        *(_library, NAMESPACE, _GIVEN, 3 + len(_NAMES), 3 + _HEAD, _results, _compute, _through),
        *(_same_device, _words, _found_gradients, _fake_gradients),
    )
)


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None = None,
    *,
    strict: bool = False,
    page_table: torch.Tensor | None = None,
    **options: Any,
) -> None:
    """flashspark.append_kv as an operator; `options` are its keyword arguments."""
    spelled: dict[str, str] = {}
    if page_table is not None:
        options["block_table"] = one_spelling(spelled, block_table=options.get("block_table"), page_table=page_table)
    names = APPEND.names[1:]
    given = dict(zip(names, (k, v, k_cache, v_cache, cache_seqlens))) | options
    if unknown := given.keys() - set(names):
        raise TypeError(f"append_kv() got an unexpected keyword argument {min(unknown)!r}")
    values = [given.get(name) for name in names]
    try:
        values = _settled(APPEND.kinds[1:], names, APPEND.fallbacks[1:], values)
        _operators.append_kv(*values, any_flag(strict=strict))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _call.respelled(error, spelled) from None


def _as_operator(function: Callable[..., Any], **through: Any) -> Callable[..., Any]:
    operator = partial(function, **through)
    operator.__doc__ = f"flashspark.{function.__name__} as an operator.\n\n{function.__doc__}"
    return operator


flash_attn_func = _as_operator(_ops.flash_attn_func, _attend=_attend)
flash_attn_varlen_func = _as_operator(_ops.flash_attn_varlen_func, _attend=_attend)
flash_attn_with_kvcache = _as_operator(_cache.flash_attn_with_kvcache, _attend=_attend, _append=append_kv)
flash_attn_qkvpacked_func = _as_operator(_packed.flash_attn_qkvpacked_func, _function=flash_attn_func)
flash_attn_kvpacked_func = _as_operator(_packed.flash_attn_kvpacked_func, _function=flash_attn_func)
flash_attn_varlen_qkvpacked_func = _as_operator(
    _packed.flash_attn_varlen_qkvpacked_func, _function=flash_attn_varlen_func
)
flash_attn_varlen_kvpacked_func = _as_operator(
    _packed.flash_attn_varlen_kvpacked_func, _function=flash_attn_varlen_func
)
