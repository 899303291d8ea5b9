"""What torch's, NumPy's and the symbols' own functions do to symbols, by their names in those libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ._graph import RULES, Node
from ._symbol import Symbol, TraceError, Tracer, constant_int, is_integer, promoted, tracer_of, type_of

Value = Any  # a Symbol, a stand-in of a captured tensor, or a number

_DTYPES = {
    **{"bool": "bool", "bool_": "bool", "boolean": "bool", "int32": "i32", "i32": "i32", "int64": "i64", "i64": "i64"},
    **{"int": "i64", "long": "i64", "int16": "i16", "int8": "i8", "uint8": "u8", "intc": "i32"},
    **dict.fromkeys(("float", "float32", "float64", "float16", "bfloat16", "half", "double", "f32"), "f32"),
}


def type_of_dtype(dtype: Any) -> str | None:
    """The graph's type of a dtype of torch, NumPy, the CuTe DSL or Python; i16, i8 and u8 too. None for others."""
    if isinstance(dtype, (str, type)):
        name = dtype if isinstance(dtype, str) else dtype.__name__
    else:
        name = getattr(dtype, "name", None) or str(dtype)
    return _DTYPES.get(str(name).rpartition(".")[2].lower())


def converted(x: Value, dtype: Any) -> Symbol:
    """x in a dtype. Half precisions stay f32, without rounding; narrow integers wrap."""
    tracer = tracer_of(x)
    kind = type_of_dtype(dtype)
    if kind is None:
        raise TraceError(f"conversion to {dtype}: must be bool, an integer of 8 to 64 bits, or a float")
    build, node = tracer.build, tracer.lift(x)
    if kind in ("i16", "i8"):
        count = build.const("i32", 16 if kind == "i16" else 24)
        return tracer.symbol(build("shr", build("shl", build.convert("i32", node), count), count))
    if kind == "u8":
        return tracer.symbol(build("and", build.convert("i32", node), build.const("i32", 255)))
    return tracer.symbol(build.convert(kind, node))


def _to(x: Value, *args: Any, dtype: Any = None, **_: Any) -> Symbol:
    for value in (dtype, *args):
        if isinstance(value, Symbol):
            return converted(x, value.node.type)
        if value is not None and not isinstance(value, bool) and type_of_dtype(value) is not None:
            return converted(x, value)
    return x  # a device


def _two(op: str, least: str = "i32") -> Callable[..., Symbol]:
    """A binary operation on operands of one type, `least` at least."""

    def function(a: Value, b: Value, *, alpha: Value = 1, **_: Any) -> Symbol:
        tracer = tracer_of(a, b)
        if alpha != 1:
            b = b * alpha
        return tracer.symbol(tracer.build(op, *promoted(tracer, (a, b), least)))

    return function


def _one(op: str, least: str = "f32", unchanged: tuple[str, ...] = ()) -> Callable[..., Symbol]:
    """A unary operation; the identity on the types in `unchanged`."""

    def function(x: Value, *_: Any, **__: Any) -> Symbol:
        tracer = tracer_of(x)
        node = tracer.lift(x)
        if node.type in unchanged:
            return tracer.symbol(node)
        return tracer.symbol(tracer.build(op, *promoted(tracer, (x,), least)))

    return function


def _bits(op: str) -> Callable[..., Symbol]:
    def function(a: Value, b: Value) -> Symbol:
        tracer = tracer_of(a, b)
        known = (type_of(tracer, a), type_of(tracer, b))
        if "f32" in known:
            raise TraceError(f"a bitwise operation ({op}) on floats: its operands must be bools or integers")
        return tracer.symbol(tracer.build(op, *promoted(tracer, (a, b), "bool")))

    return function


def _shift(op: str) -> Callable[..., Symbol]:
    def function(a: Value, b: Value) -> Symbol:
        tracer = tracer_of(a, b)
        nodes = promoted(tracer, (a, b))
        if not is_integer(nodes[0]):
            raise TraceError(f"a shift ({op}) of floats: its operands must be integers")
        return tracer.symbol(tracer.build(op, *nodes))

    return function


def _compare(op: str) -> Callable[..., Symbol]:
    def function(a: Value, b: Value) -> Symbol:
        tracer = tracer_of(a, b)
        return tracer.symbol(tracer.build(op, *promoted(tracer, (a, b), "bool" if op in ("eq", "ne") else "i32")))

    return function


def _not(x: Value) -> Symbol:
    tracer = tracer_of(x)
    node = tracer.lift(x)
    if node.type == "f32":
        raise TraceError("~ of a float: its operand must be a bool or an integer")
    return tracer.symbol(tracer.build("not", node))


def _bool(x: Value) -> Symbol:
    return converted(x, "bool")


def _logical(op: str) -> Callable[..., Symbol]:
    def function(a: Value, b: Value) -> Symbol:
        tracer = tracer_of(a, b)
        build = tracer.build
        return tracer.symbol(build(op, *(build.convert("bool", tracer.lift(x)) for x in (a, b))))

    return function


def where(condition: Value, yes: Value, no: Value) -> Symbol:
    tracer = tracer_of(condition, yes, no)
    chosen = tracer.build.convert("bool", tracer.lift(condition))
    return tracer.symbol(tracer.build.where(chosen, *promoted(tracer, (yes, no), "bool")))


def _power(x: Value, y: Value) -> Symbol:
    tracer = tracer_of(x, y)
    exponent = constant_int(y) if not isinstance(y, float) else (int(y) if y in (2.0, 3.0, 1.0) else None)
    if exponent is not None and 1 <= exponent <= 4 and isinstance(x, Symbol) and x.node.type != "bool":
        square = x * x
        return (x, square, square * x, square * square)[exponent - 1]
    nodes = promoted(tracer, (x, y))
    if is_integer(nodes[0]):
        return _integer_power(tracer, x, y, exponent)
    return tracer.symbol(tracer.build("pow", *nodes))


def _integer_power(tracer: Tracer, x: Value, y: Value, exponent: int | None) -> Symbol:
    if exponent == 0:
        return full_like(x, 1)
    if exponent is not None and exponent > 0:
        half = _power(x, exponent // 2)
        return half * half * x if exponent % 2 else half * half
    if constant_int(x) == 2:
        n = converted(y, "i32")
        return where((n < 0) | (n > 31), 0, tracer.functions["bitwise_left_shift"](1, n))
    raise TraceError("an integer to the power of an integer: make the base a float, as in 2.0 ** x or x.float() ** n")


def _divided(a: Value, b: Value, *, rounding_mode: str | None = None, **_: Any) -> Symbol:
    if rounding_mode == "floor":
        return FUNCTIONS["floor_divide"](a, b)
    quotient = _two("div", "f32")(a, b)
    if rounding_mode is None:
        return quotient
    tracer = tracer_of(a, b)
    nodes = promoted(tracer, (a, b))
    if not is_integer(nodes[0]):
        return FUNCTIONS["trunc"](quotient)
    x, y = map(tracer.symbol, nodes)
    size = FUNCTIONS["floor_divide"](FUNCTIONS["abs"](x), FUNCTIONS["abs"](y))
    return where((x < 0) ^ (y < 0), -size, size)


def _fmod(a: Value, b: Value) -> Symbol:
    tracer = tracer_of(a, b)
    x, y = map(tracer.symbol, promoted(tracer, (a, b)))
    rest = FUNCTIONS["remainder"](FUNCTIONS["abs"](x), FUNCTIONS["abs"](y))
    return where(x < 0, -rest, rest)


def _clamp(x: Value, min: Value = None, max: Value = None, a_min: Value = None, a_max: Value = None) -> Symbol:
    low, high = (min if a_min is None else a_min), (max if a_max is None else a_max)
    if low is not None:
        x = FUNCTIONS["maximum"](x, low)
    return x if high is None else FUNCTIONS["minimum"](x, high)


def _ignoring_nan(op: str) -> Callable[..., Symbol]:
    def function(a: Value, b: Value) -> Symbol:
        tracer = tracer_of(a, b)
        x, y = map(tracer.symbol, promoted(tracer, (a, b)))
        chosen = tracer.symbol(tracer.build(op, x.node, y.node))
        if is_integer(x.node):
            return chosen
        return where(FUNCTIONS["isnan"](x), y, where(FUNCTIONS["isnan"](y), x, chosen))

    return function


def _round(x: Value, decimals: int = 0, **_: Any) -> Symbol:
    if decimals == 0 or tracer_of(x).lift(x).type != "f32":
        return _one("round", unchanged=("bool", "i32", "i64"))(x)
    scale = 10.0**decimals
    return _one("round")(x * scale) / scale


def full_like(x: Value, value: Value = 0, dtype: Any = None, **_: Any) -> Symbol:
    """`value` in x's type, or in `dtype`."""
    tracer = tracer_of(x, value)
    kind = tracer.lift(x).type if dtype is None else type_of_dtype(dtype)
    result = tracer.symbol(tracer.lift(value, like=kind))
    return converted(result, kind)


def _new(value: int) -> Callable[..., Symbol]:
    def function(x: Value, *size: Any, dtype: Any = None, **kwargs: Any) -> Symbol:
        _require_scalar((*size, *([kwargs["size"]] if "size" in kwargs else ())))
        return full_like(x, value, dtype)

    return function


def _require_scalar(size: tuple[Any, ...]) -> None:
    if size not in ((), ((),), ([],)):
        raise TraceError(f"a new tensor of size {size}: must have size (), one number")


def _new_full(x: Value, size: Any, fill_value: Value, dtype: Any = None, **_: Any) -> Symbol:
    _require_scalar((size,))
    return full_like(x, fill_value, dtype)


def _classified(name: str) -> Callable[..., Symbol]:
    """isnan and its kin, which are constants for integers."""

    def function(x: Value) -> Symbol:
        tracer = tracer_of(x)
        x = tracer.symbol(tracer.build.convert("f32", tracer.lift(x)))
        if name in ("isnan", "isinf"):
            return tracer.symbol(tracer.build(name, x.node))
        if name == "isfinite":
            return ~(tracer.functions["isnan"](x) | tracer.functions["isinf"](x))
        return x == (math.inf if name == "isposinf" else -math.inf)

    return function


def _nan_to_num(x: Value, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Symbol:
    big = float(np.finfo(np.float32).max)
    y = where(FUNCTIONS["isnan"](x), nan, x)
    y = where(y == math.inf, big if posinf is None else posinf, y)
    return where(y == -math.inf, -big if neginf is None else neginf, y)


def _softplus(x: Value, beta: float = 1.0, threshold: float = 20.0) -> Symbol:
    scaled = x * float(beta)
    soft = (FUNCTIONS["maximum"](scaled, 0.0) + FUNCTIONS["log1p"](FUNCTIONS["exp"](-FUNCTIONS["abs"](scaled)))) / beta
    return where(scaled > float(threshold), x, soft)


def _gelu(x: Value, approximate: str = "none") -> Symbol:
    if approximate == "tanh":
        return 0.5 * x * (1.0 + FUNCTIONS["tanh"](math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
    return 0.5 * x * (1.0 + FUNCTIONS["erf"](x * math.sqrt(0.5)))


def _logaddexp(a: Value, b: Value) -> Symbol:
    high = FUNCTIONS["maximum"](a, b) * 1.0
    soft = high + FUNCTIONS["log1p"](FUNCTIONS["exp"](-FUNCTIONS["abs"](a - b)))
    return where(FUNCTIONS["isinf"](high), high, soft)


def _item(*_: Any, **__: Any) -> Any:
    raise TraceError(".item(), .tolist(), .numpy(): the value is not known while the function is traced")


def _same(x: Value, *_: Any, **__: Any) -> Value:
    return x


def _detached(x: Value, *_: Any, **__: Any) -> Value:
    """The same number. No operation of graphs stops a gradient, so that calls with gradients refuse such a graph."""
    tracer = tracer_of(x)
    node: Node = tracer.lift(x)
    if node.type == "f32" and node.op != "const":
        tracer.detaches = True
    return x


def _floating(x: Value) -> bool:
    node: Node = tracer_of(x).lift(x)
    return node.type == "f32"


_INTEGER = ("bool", "i32", "i64")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _one(name) for name, rule in RULES.items() if rule[0] == 1 and rule[1] == ("f32",)},
    **{name: _one(name, unchanged=_INTEGER) for name in ("floor", "ceil", "trunc")},
    **{name: _compare(name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{name: _classified(name) for name in ("isnan", "isinf", "isfinite", "isposinf", "isneginf")},
    **{"add": _two("add"), "sub": _two("sub"), "mul": _two("mul"), "div": _divided, "pow": _power, "where": where},
    "method where": lambda x, condition, other: where(condition, x, other),
    "float_power": lambda x, y: _power(FUNCTIONS["float"](x) if isinstance(x, Symbol) else float(x), y),
    **{"rsub": lambda a, b, **k: FUNCTIONS["sub"](b, a, **k), "rpow": lambda a, b: _power(b, a)},
    **{"floor_divide": _two("floordiv"), "remainder": _two("mod"), "fmod": _fmod, "atan2": _two("atan2", "f32")},
    **{"neg": _one("neg", "i32"), "abs": _one("abs", "i32"), "sign": _one("sign", "i32"), "positive": _same},
    **{"minimum": _two("min"), "maximum": _two("max"), "fmin": _ignoring_nan("min"), "fmax": _ignoring_nan("max")},
    **{"clamp": _clamp, "clamp_min": _clamp, "clamp_max": lambda x, max: _clamp(x, None, max)},
    **{"bitwise_and": _bits("and"), "bitwise_or": _bits("or"), "bitwise_xor": _bits("xor"), "bitwise_not": _not},
    **{"bitwise_left_shift": _shift("shl"), "bitwise_right_shift": _shift("shr")},
    **{"logical_and": _logical("and"), "logical_or": _logical("or"), "logical_xor": _logical("xor")},
    **{"logical_not": lambda x: _not(_bool(x)), "round": _round, "frac": lambda x: x - FUNCTIONS["trunc"](x)},
    **{
        "square": lambda x: x * x,
        "reciprocal": lambda x: 1.0 / x,
        "log10": lambda x: FUNCTIONS["log"](x) / math.log(10),
    },
    **{"erfc": lambda x: 1.0 - FUNCTIONS["erf"](x), "hypot": lambda a, b: FUNCTIONS["sqrt"](a * a + b * b)},
    **{"relu": lambda x, inplace=False: FUNCTIONS["maximum"](x, 0), "relu6": lambda x, inplace=False: _clamp(x, 0, 6)},
    "leaky_relu": lambda x, negative_slope=0.01, inplace=False: where(x >= 0, x, x * float(negative_slope)),
    **{"silu": lambda x, inplace=False: x * FUNCTIONS["sigmoid"](x), "gelu": _gelu, "softplus": _softplus},
    **{"logaddexp": _logaddexp, "lerp": lambda a, b, w: a + w * (b - a), "nan_to_num": _nan_to_num},
    "logsigmoid": lambda x: -_softplus(-x),
    "masked_fill": lambda x, mask, value: where(mask, full_like(x, value), x),
    **{"full_like": full_like, "zeros_like": lambda x, **k: full_like(x, 0, **k)},
    **{"ones_like": lambda x, **k: full_like(x, 1, **k)},
    **{"new_zeros": _new(0), "new_ones": _new(1), "new_full": _new_full},
    "new_tensor": lambda x, value, dtype=None, **_: (
        converted(tracer_of(x).symbol(tracer_of(x).lift(value)), dtype)
        if dtype is not None
        else tracer_of(x).symbol(tracer_of(x).lift(value))
    ),
    **{"to": _to, "astype": lambda x, dtype, **_: converted(x, dtype), "type_as": _to},
    **{name: (lambda x, _kind=kind: converted(x, _kind)) for name, kind in _DTYPES.items() if name != "boolean"},
    **{"short": lambda x: converted(x, "int16"), "char": lambda x: converted(x, "int8")},
    "int": lambda x: converted(x, "int32"),
    **{name: _same for name in ("clone", "contiguous", "view", "reshape", "expand", "squeeze", "cpu", "cuda")},
    **{name: _same for name in ("conj", "real", "requires_grad_", "copy", "asarray", "array")},
    **{"detach": _detached, "stop_gradient": _detached},
    **{name: _item for name in ("item", "tolist", "numpy")},
    **{"dim": lambda x: 0, "numel": lambda x: 1, "size": lambda x, *_: (), "is_floating_point": _floating},
}


_ALIASES = {
    **{"subtract": "sub", "multiply": "mul", "true_divide": "div", "divide": "div", "truediv": "div"},
    **{"rmul": "mul", "radd": "add", "rand": "bitwise_and", "ror": "bitwise_or", "rxor": "bitwise_xor"},
    **{"floordiv": "floor_divide", "mod": "remainder", "power": "pow", "negative": "neg"},
    **{"absolute": "abs", "fabs": "abs", "sgn": "sign", "clip": "clamp", "rint": "round", "around": "round"},
    **{"fix": "trunc", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arctan2": "atan2", "expit": "sigmoid"},
    **{"less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "equal": "eq", "not_equal": "ne"},
    **{"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"},
    **{"left_shift": "bitwise_left_shift", "right_shift": "bitwise_right_shift", "log_sigmoid": "logsigmoid"},
    **{"lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift"},
}
FUNCTIONS.update({alias: FUNCTIONS[name] for alias, name in _ALIASES.items()})
for _name, _function in (("rdiv", _divided), ("rtruediv", _divided), ("rfloordiv", FUNCTIONS["floor_divide"])):
    FUNCTIONS[_name] = lambda a, b, _function=_function: _function(b, a)
for _name, _alias in (("rmod", "remainder"), ("rlshift", "bitwise_left_shift"), ("rrshift", "bitwise_right_shift")):
    FUNCTIONS[_name] = lambda a, b, _function=FUNCTIONS[_alias]: _function(b, a)
