"""Wrong values for an argument, by the kinds of bindings/signature.def.

Each is (name, expectation, value). Expectations: "same": the same values in another form, refused or with the same
result; "refuse": an error; "any": an error or a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import ml_dtypes
import numpy as np

try:
    import torch
except ImportError:
    torch = None

Value = tuple[str, str, Any]

NO_TENSORS: list[Value] = [
    *(("text", "refuse", "text"), ("bytes", "refuse", b"\0\1"), ("object", "refuse", object()), ("set", "refuse", {1})),
    *(("list", "refuse", [0, 1]), ("tuple", "refuse", (0, 1)), ("dict", "refuse", {"a": 1}), ("empty", "refuse", [])),
    *(("bool", "refuse", True), ("2**40", "refuse", 2**40), ("-1", "refuse", -1), ("-2**70", "refuse", -(2**70))),
    *(("nan", "refuse", float("nan")), ("inf", "refuse", float("inf")), ("complex", "refuse", 1j)),
    *(("function", "refuse", len), ("type", "refuse", int), ("ellipsis", "refuse", ...)),
    *(("NumPy float", "refuse", np.float32(1)), ("NumPy bool", "refuse", np.bool_(True))),
]
TYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "int64", "uint64", "float16", "float32", "float64"]
ODD_TYPES = ["complex64", "complex128", ">f4", ">i4", "O", "U3", "S2", "M8[s]", "m8[s]", [("a", "f4")]]


class _Dlpack:
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("not today")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class _Subclass(np.ndarray):
    pass


def arrays(x: np.ndarray) -> Iterator[Value]:
    """NumPy arrays, and things that are not arrays, to pass instead of x."""
    yield from NO_TENSORS
    yield "no dlpack", "refuse", _Dlpack()
    for name in TYPES:
        if np.dtype(name) != x.dtype:
            yield name, "any", x.astype(np.float32).astype(name)
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4):
        if x.dtype != dtype:
            yield np.dtype(dtype).name, "any", x.astype(np.float32).astype(dtype)
    for odd in ODD_TYPES:
        yield f"type {odd}", "refuse", np.zeros(x.shape, odd)
    for shape in ((), (0,), (1,), (0,) * max(x.ndim, 1), (*x.shape, 1), (1, *x.shape), (1,) * 9):
        if shape != x.shape:
            yield f"shape {shape}", "any", np.zeros(shape, x.dtype)
    yield "flat", "any", x.reshape(-1)
    yield "shorter", "any", x[:-1]
    yield "huge strides", "any", np.lib.stride_tricks.as_strided(x[:0], (0,) * x.ndim, (2**61,) * x.ndim)
    yield "endless", "any", np.broadcast_to(x.reshape(-1)[:1], (2**40,) * min(x.ndim, 1) + (1,) * (x.ndim - 1))
    yield "masked", "refuse", np.ma.masked_array(x, np.zeros(x.shape, bool))
    yield "matrix", "any", np.asmatrix(np.zeros((2, 2), x.dtype))
    yield "subclass", "same", x.view(_Subclass)
    yield "gaps", "same", np.repeat(x, 2, -1)[..., ::2]
    yield "backwards", "same", x[..., ::-1].copy()[..., ::-1]
    yield "outer backwards", "same", x[::-1].copy()[::-1]
    yield "Fortran", "same", np.asfortranarray(x)
    shifted = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    yield "not aligned", "same", shifted


def frozen(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def numbers() -> Iterator[Value]:
    """Values to pass instead of an int, a float, a bool or a str."""
    yield from (
        ("text", "any", "text"),
        ("empty text", "any", ""),
        ("object", "refuse", object()),
        ("list", "refuse", [1]),
    )
    yield from (
        ("tuple", "refuse", (1, 2)),
        ("dict", "refuse", {}),
        ("bytes", "refuse", b"1"),
        ("complex", "refuse", 1j),
    )
    for value in (
        True,
        False,
        1,
        -1,
        -2,
        2**31,
        2**40,
        2**63,
        -(2**31) - 1,
        -(2**70),
        2**70,
        10**400,
        0.5,
        -0.5,
        1e300,
    ):
        yield f"{value!r:.20}", "any", value
    for value in (float("nan"), float("inf"), float("-inf"), Decimal("NaN"), Decimal(1)):
        yield f"{value!r}", "any", value
    for dtype in (
        "int8",
        "int64",
        "uint64",
        "float16",
        "float64",
        "longdouble",
        "bool",
        "complex64",
        "U2",
        "M8[s]",
        "O",
    ):
        for shape in ((), (1,), (2,), (0,)):
            yield f"{dtype} {shape}", "any" if shape == () else "refuse", np.zeros(shape, dtype)
        yield f"{dtype} scalar", "any", np.zeros(1, dtype)[0]
    yield "NumPy nan", "any", np.float32("nan")
    yield "NumPy inf", "any", np.float64("inf")
    yield "2**63 of NumPy", "any", np.uint64(2**63)
    yield "masked", "refuse", np.ma.masked


def all_numbers() -> Iterator[Value]:
    yield from numbers()
    yield from torch_numbers()


def torch_numbers() -> Iterator[Value]:
    for dtype in (
        torch.int32,
        torch.int64,
        torch.float32,
        torch.bfloat16,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    ):
        yield f"0-d {dtype}", "any", torch.zeros((), dtype=torch.float32).to(dtype)
        yield f"1-d {dtype}", "refuse", torch.zeros(1, dtype=torch.float32).to(dtype)
    yield "0-d meta", "refuse", torch.zeros((), device="meta")
    yield "0-d nan", "any", torch.tensor(float("nan"))
    yield "0-d sparse", "refuse", torch.zeros(()).to_sparse()


def tensors(x: Any) -> Iterator[Value]:
    """torch tensors, and things that are not tensors, to pass instead of x."""
    yield from NO_TENSORS
    yield "no dlpack", "refuse", _Dlpack()
    for name in ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"):
        if getattr(torch, name) != x.dtype:
            yield name, "any", x.float().to(getattr(torch, name))
    for name in ("uint16", "uint32", "float8_e4m3fn", "float8_e5m2"):
        if getattr(torch, name) != x.dtype:
            yield name, "any", torch.zeros(x.shape, dtype=torch.float32).to(getattr(torch, name))
    for shape in ((), (0,), (1,), (0,) * max(x.ndim, 1), (*x.shape, 1), (1, *x.shape)):
        if shape != tuple(x.shape):
            yield f"shape {shape}", "any", torch.zeros(shape, dtype=torch.float32).to(x.dtype)
    yield "shorter", "any", x[:-1]
    yield "gaps", "same", x.repeat_interleave(2, -1)[..., ::2]
    yield "transposed", "same", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "endless", "any", x.reshape(-1)[:1].expand(2**40).view(2**40, *(1,) * (x.ndim - 1))
    yield "complex", "refuse", torch.zeros(x.shape, dtype=torch.complex64)
    yield "conjugate", "refuse", torch.zeros(x.shape, dtype=torch.complex64).conj()
    yield "meta", "refuse", x.to("meta")
    yield "nested", "refuse", torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    yield "jagged", "refuse", torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.jagged)
    yield "sparse", "refuse", torch.zeros(x.shape).to(x.dtype).to_sparse()
    yield "sparse rows", "refuse", torch.eye(3).to_sparse_csr()
    yield "parameter", "same", torch.nn.Parameter(x, requires_grad=False)
    if x.is_floating_point():
        yield from _floating(x)
    else:
        yield "imaginary", "any", torch.zeros(x.shape, dtype=torch.complex64).imag


def _floating(x: Any) -> Iterator[Value]:
    yield "gradient", "refuse", x.clone().requires_grad_()
    yield "gradient of a view", "refuse", x.clone().requires_grad_().view(x.shape)
    yield "result with a gradient", "refuse", x.clone().requires_grad_() * 1
    if x.dtype == torch.float32:
        yield "negative", "same", torch._neg_view(-x)
        yield "oneDNN", "refuse", x.to_mkldnn()
        yield "quantised", "refuse", torch.quantize_per_tensor(x.nan_to_num(), 0.1, 0, torch.qint8)
