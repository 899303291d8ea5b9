"""NumPy arrays, torch tensors and CuPy arrays: telling them apart, checking them, allocating results like them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
import tvm_ffi

try:
    import ml_dtypes
except ImportError:  # not among what Hugging Face's loader makes sure of; torch tensors do without
    ml_dtypes = None

Array = Any  # numpy.ndarray, torch.Tensor or another DLPack producer

FLOAT32 = np.dtype(np.float32)
# Without ml_dtypes no array has these types. Structures that nothing else uses stand for them then.
BFLOAT16 = np.dtype(ml_dtypes.bfloat16 if ml_dtypes else [("bfloat16", np.uint16)])
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn if ml_dtypes else [("float8_e4m3fn", np.uint8)])
BFLOAT16_NUMBER = BFLOAT16.num if ml_dtypes else -1
# flashspark_dtype of the C header, by the names of the types.
DTYPE_CODES = {"float32": 1, "float16": 2, "bfloat16": 3, "float8_e4m3fn": 4}
# The type numbers of ml_dtypes lie above those of NumPy's own types, and NumPy exports none of them through DLPack.
# Their arrays are passed as integers of the same width, with a flashspark_dtype beside them.
LAST_NUMPY_TYPE = np.dtype(np.float16).num
_STORED = {
    BFLOAT16_NUMBER: (np.dtype(np.uint16), DTYPE_CODES["bfloat16"]),
    E4M3.num if ml_dtypes else -2: (np.dtype(np.uint8), DTYPE_CODES["float8_e4m3fn"]),
}

_WANTED = "must be a NumPy array, a torch tensor or another DLPack tensor"


def is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_cupy(x: object) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def is_jax(x: object) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.Array)


def is_masked(x: object) -> bool:
    """Whether x is a NumPy array with a mask. Without its module loaded there can be none."""
    masked = sys.modules.get("numpy.ma")
    return masked is not None and isinstance(x, masked.MaskedArray)


def differentiable(x: object) -> bool:
    """Whether x is a torch tensor through which a gradient flows: one that requires it, outside of torch.no_grad(), or
    one inside a transformation of torch.func."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return False
    return (x.requires_grad and torch.is_grad_enabled()) or torch._C._functorch.is_gradtrackingtensor(x)


def in_forward_mode() -> bool:
    """Whether torch tensors may have tangents: within torch.autograd.forward_ad.dual_level() or torch.func.jvp."""
    return sys.modules["torch"].autograd.forward_ad._current_level >= 0


def has_tangent(x: Any) -> bool:
    """Whether x is a torch tensor with a derivative in forward mode."""
    if not in_forward_mode():
        return False
    torch = sys.modules["torch"]
    return isinstance(x, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def refuse_tangents(names: Iterable[str], values: Iterable[Any]) -> None:
    for name, x in zip(names, values):
        if has_tangent(x):
            refuse_tangent(name)


def refuse_tangent(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} = tensor with a tangent: must be without, flashspark's attention has no derivatives in forward mode "
        "(torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) has)"
    )


def array(name: str, x: Any, written: bool = False) -> Array:
    """`x` as an array whose memory holds its values, without a gradient. Raises an error that names it if it is none.

    written: the call writes into it, so that a copy cannot take its place.
    """
    if isinstance(x, np.ndarray):
        if is_masked(x):
            raise TypeError(f"{name} = masked array: must be a plain array, masks are not supported")
        if written and not x.flags.writeable:
            raise ValueError(f"{name} = read-only array: must be writable")
        return x
    if is_torch(x):
        return _torch_array(name, x, written)
    if x is None or isinstance(x, (str, bytes, int, float, complex, list, tuple, dict, set, np.generic)):
        raise TypeError(f"{name} = {_described(x)}: {_WANTED}")
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} = {type(x).__name__}: {_WANTED}")
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return x
    try:
        return tvm_ffi.from_dlpack(x)
    except Exception as error:
        raise TypeError(f"{name} = {type(x).__name__}: {_first_line(error)}") from None


def _described(x: Any) -> str:
    kinds = {bool: "a bool", int: "an int", float: "a float", str: "a str", list: "a list", tuple: "a tuple"}
    return "None" if x is None else kinds.get(type(x), type(x).__name__)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _torch_array(name: str, x: Array, written: bool) -> Array:
    torch = sys.modules["torch"]
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise TypeError(f"{name} = tensor inside torch.func: must be a plain tensor, it cannot be transformed here")
    if has_tangent(x):
        refuse_tangent(name)
    if x.requires_grad:
        if torch.is_grad_enabled():
            raise ValueError(
                f"{name}.requires_grad = True: must be False, or call under torch.no_grad(): "
                "no gradient is computed for it"
            )
        x = x.detach()
    kind = type(x)
    if kind is not torch.Tensor:
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise TypeError(f"{name} = {kind.__name__}: must be a plain tensor, whose memory holds its values")
        x = x.as_subclass(torch.Tensor)
    if x.is_nested:
        raise TypeError(f"{name} = nested tensor: must be a plain tensor; lengths go in cu_seqlens or seqused")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}.layout = {x.layout}: must be torch.strided")
    if x.is_quantized or x.is_complex():
        raise TypeError(f"{name}.dtype = {_dtype_name(x)}: must be a plain type")
    if not (x.is_cpu or x.is_cuda):
        raise NotImplementedError(f"{name}.device = {x.device}: must be the CPU or a CUDA device")
    if not (x.is_neg() or x._is_zerotensor()):
        return x
    if written:
        raise ValueError(f"{name} = lazily negated or zero tensor: must hold its values in memory")
    return held(x)


def held(x: Array) -> Array:
    """A lazily negated or zero torch tensor, as one that holds its values in memory."""
    return x.resolve_neg() if x.is_neg() else sys.modules["torch"].zeros(x.shape, dtype=x.dtype, device=x.device)


def _dtype_name(x: Array) -> str:
    return str(x.dtype).removeprefix("torch.")


def stored(x: Array, place: int) -> tuple[Array, int]:
    """`x` in a type that DLPack can carry, and its four bits of the `stored_as` argument."""
    if isinstance(x, np.ndarray):
        number = x.dtype.num
        if number > LAST_NUMPY_TYPE and number in _STORED:
            integer, code = _STORED[number]
            return x.view(integer), code << 4 * place
    elif is_torch(x) and x.dtype.itemsize == 1 and x.dtype is sys.modules["torch"].float8_e4m3fn:
        return x.view(sys.modules["torch"].uint8), DTYPE_CODES["float8_e4m3fn"] << 4 * place
    return x, 0


def bump(*written: Array | None) -> None:
    """Increments torch's version counters of tensors written in place, by which a backward pass detects the change."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for x in written:
        if isinstance(x, torch.Tensor) and not x.is_inference():
            torch.autograd.graph.increment_version(x)


def empty_like(x: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array of x's kind, on its device. `dtype` is NumPy's or torch's, as out_dtype gives it."""
    if isinstance(x, np.ndarray):
        return np.empty(shape, dtype)
    if is_torch(x):
        return x.new_empty(shape, dtype=dtype)
    if is_cupy(x):
        with x.device:
            return sys.modules["cupy"].empty(shape, dtype)
    if is_jax(x):
        if (platform := next(iter(x.devices())).platform) != "cpu":  # whose stream this call cannot wait for
            raise NotImplementedError(f"q.device = {platform}: JAX arrays must be on the CPU")
        # Nothing else refers to this memory yet, so that it may be written.
        return sys.modules["jax"].numpy.zeros(shape, dtype, device=x.sharding).block_until_ready()
    raise TypeError(
        f"q = {type(x).__name__}: results are allocated for NumPy, CuPy and JAX arrays and torch tensors; "
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
        return E4M3
    return BFLOAT16 if dtype == E4M3 else dtype


def empty_out(q: Array, v: Array, output_scale: Array | None) -> Array:
    if not isinstance(q, np.ndarray) and not is_torch(q) and not is_cupy(q):
        empty_like(q, (), None)  # raises, naming q
    if not hasattr(v, "shape"):
        array("v", v)  # raises, naming v
    return empty_like(q, (*q.shape[:-1], *v.shape[-1:]), out_dtype(q, output_scale))


def empty_lse(q: Array, varlen: bool) -> Array | None:
    """float32 (num_heads, total_q) or (num_seqs, num_heads, seqlen_q). None if the native call will refuse q."""
    shape = tuple(q.shape)
    if len(shape) != (3 if varlen else 4):
        return None
    float32 = sys.modules["torch"].float32 if is_torch(q) else FLOAT32
    return empty_like(q, (shape[1], shape[0]) if varlen else (shape[0], shape[2], shape[1]), float32)


def lengths(name: str, offsets: Array) -> Array:
    """int32 (n,): the lengths between offsets int32 (n + 1,). Works on torch's fake and meta tensors, too."""
    if not is_torch(offsets) or not _may_be_fake(offsets):
        offsets = array(name, offsets)
    dtype = str(offsets.dtype).removeprefix("torch.")
    if dtype != "int32":
        raise TypeError(f"{name}.dtype = {dtype}: must be int32")
    if len(offsets.shape) != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name}.shape = {tuple(offsets.shape)}: must be (num_seqs + 1,)")
    return offsets[1:] - offsets[:-1]


def _may_be_fake(x: Array) -> bool:
    """Whether arithmetic on a torch tensor is torch's own, real or traced."""
    torch = sys.modules["torch"]
    own = type(x) is torch.Tensor or type(x).__module__.startswith("torch.")
    return own and not x.is_nested and x.layout is torch.strided


def sum_of(**terms: Any) -> Array:
    """The sum of two arrays of lengths int32 (n,), or of one and a number. Works on fake and meta tensors, too."""
    first, second = terms.values()
    try:
        return first + second
    except Exception as error:
        for name, x in terms.items():
            if not isinstance(x, int):
                array(name, x)  # raises if this one is the cause
        name = next(iter(terms))
        raise TypeError(f"{name} = {_described(first)}: {_first_line(error)}") from None
