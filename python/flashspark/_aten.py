"""Runs a graph of ATen's operations, as torch.compile makes it of a score or mask function, on symbols."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._functions import FUNCTIONS, converted
from ._symbol import Symbol, TraceError
from ._tensor_proxy import TensorProxy


def _index(x: Any, indices: Any) -> Any:
    return x[tuple(slice(None) if i is None else i for i in indices)]


def _select(x: Any, dim: int, index: Any) -> Any:
    return x if isinstance(x, Symbol) else x[(*(slice(None),) * dim, index)]


def _copied(x: Any, dtype: Any = None, **_: Any) -> Any:
    return converted(x, dtype) if dtype is not None and isinstance(x, Symbol) else x


def _constant(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


_NAMES: dict[str, Callable[..., Any]] = {
    **{"index": _index, "select": _select, "_to_copy": _copied, "convert_element_type": _copied},
    **{"scalar_tensor": _constant, "full": lambda _, value, **__: value},
    **{"zeros": lambda *_, **__: 0, "ones": lambda *_, **__: 1},
    **{name: _same for name in ("lift_fresh_copy", "lift_fresh", "alias", "unsqueeze", "_unsafe_view", "view_as")},
}


class AtenGraph:
    """A torch.fx.GraphModule as a function of symbols."""

    _flashspark_opaque = True  # a tracer does not look into it

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, *inputs: Any) -> Any:
        known: dict[Any, Any] = {}
        given = iter(inputs)

        def value(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(map(value, x))
            return known[x] if type(x).__name__ == "Node" else x

        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
            elif node.op == "get_attr":
                known[node] = self._attribute(node.target)
            elif node.op == "call_function":
                arguments = {name: value(x) for name, x in node.kwargs.items()}
                known[node] = _call(node.target, [value(x) for x in node.args], arguments)
            elif node.op == "output":
                result = value(node.args[0])
                return result[0] if isinstance(result, (list, tuple)) else result
            else:
                raise TraceError(f"{node.op} {node.target}: is not supported in a score function or mask function")
        raise TraceError("the graph returns nothing")

    def _attribute(self, path: str) -> Any:
        owner = self._module
        for name in path.split("."):
            owner = getattr(owner, name)
        if not hasattr(owner, "shape") or len(owner.shape) > 0:
            raise TraceError(f"the constant {path}: must be one number")
        return owner.item()


def _call(target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if not any(isinstance(x, (Symbol, TensorProxy)) for x in (*args, *kwargs.values())) and callable(target):
        name = _name(target)
        return _NAMES[name](*args, **kwargs) if name in _NAMES else target(*args, **kwargs)
    name = _name(target)
    function = _NAMES.get(name) or FUNCTIONS.get(name) or FUNCTIONS.get(name.strip("_"))
    if function is None:
        raise TraceError(f"{target}: is not supported in a score function or mask function")
    return function(*args, **kwargs)


def _name(target: Any) -> str:
    """`add` of aten.add.Tensor and of operator.add."""
    schema = getattr(target, "_schema", None)
    return str(target.__name__ if schema is None else schema.name.rpartition("::")[2])
