"""Many random functions in one call, of which query head h computes function h, against their values in float64.

Group reads values back through the attention kernel: each row keeps one key, so that its lse is that key's new score;
a mask function's value is whether the row keeps the key at all. BlockGroup does so through create_block_mask, whose
kernel is compiled in a fifth of the time: a mask function says whether each value is as near as it should be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flashspark import _core
from flashspark._call import FUNC, attend
from flashspark._graph import Builder, Node, to_text, walk
from flashspark._user_functions import Functions, captured_argument, extras_of, native_of_text
from problems import offsets
from random_graphs import Captured, RandomGraph, allowed

Moved = Callable[[np.ndarray], Any]  # brings an array to where a call is to be computed
# (queries, keys) of the sequences. Few rows, so that a GPU's kernel is one with few scores a lane: compiling a function
# takes a time in proportion.
LENGTHS = [(16, 40), (9, 64), (13, 23)]
WIDTH = 128
BLOCK = 16
SHAPE = (2, 16, 32)  # sequences, queries and keys of a block mask


def _of_heads(build: Builder, roots: list[Node]) -> Node:
    """Root h for query head h."""
    head, chosen = build.input("h"), roots[-1]
    for n in reversed(range(len(roots) - 1)):
        chosen = build.where(build("eq", head, build.const("i32", n)), roots[n], chosen)
    return chosen


class Group:
    """As many functions of one kind, which share captured tensors; and the call that computes all of them."""

    def __init__(self, seed: int, count: int, wild: bool) -> None:
        """wild: some indices are outside of their tensors, of which a GPU reads the nearest element."""
        rng, build = np.random.default_rng(seed), Builder()
        self.seed, self.captured = seed, Captured(rng)
        self.kind = "mask" if seed % 5 == 4 else "score"
        type, score = ("bool", None) if self.kind == "mask" else ("f32", build.input("score"))
        self.graphs = [RandomGraph([seed, n], build, self.captured, type, score, wild, 40) for n in range(count)]
        chosen = _of_heads(build, [graph.root for graph in self.graphs])
        self._functions = {"mask": _keeps_one(build, chosen if self.kind == "mask" else None)}
        if self.kind == "score":
            self._functions["score"] = chosen
        rows, keys = (sum(x[i] for x in LENGTHS) for i in range(2))
        # The score is one product, which every type holds. As many heads of keys: packed heads would be many rows.
        self.q, self.k = np.zeros((rows, count, WIDTH), np.float16), np.zeros((keys, count, WIDTH), np.float16)
        self.q[..., 0] = rng.integers(-63, 64, (rows, count)) / 4
        self.k[..., 0] = rng.choice([-1, 1], (keys, count))

    def run(self, moved: Moved, implementation: str | None = None) -> np.ndarray:
        """lse (functions, rows)."""
        functions, numbers = [], []
        for kind in ("score", "mask"):
            if kind not in self._functions:
                functions.append((None, ()))
                numbers.append(())
                continue
            node, tensors, scalars = compact(self._functions[kind])
            given = [moved(self.captured.tensors[n]) for n in tensors]
            functions.append((native_of_text(kind, to_text([node])), given))
            numbers.append([self.captured.scalars[n] for n in scalars])
        more = extras_of(functions, None, numbers)
        head = (1.0, False, -1, -1, 0.0, 0, False, implementation, 0)
        cu = [moved(offsets([x[i] for x in LENGTHS])) for i in range(2)]
        tail = (cu[0], max(x for x, _ in LENGTHS), cu[1], max(x for _, x in LENGTHS))
        q, k = moved(self.q), moved(self.k)
        call = Functions(lambda: (None, None, None), more)
        return attend(FUNC, (q, k, k), None, None, True, None, head, tail, call)[1]

    def check(self, lse: np.ndarray) -> None:
        """Asserts that each function gave its values."""
        points = _points()
        score = self.q[points["row"], :, 0].astype(np.float64) * self.k[points["key"], :, 0]  # (points, functions)
        for n, graph in enumerate(self.graphs):
            inputs = {**points, "h": np.int32(n), "score": score[:, n]}
            got = lse[n].astype(np.float64)
            wanted, error = allowed(graph, inputs, self.captured, [self.seed, n])
            wanted, error = (np.broadcast_to(x, got.shape) for x in (wanted, error))
            right = np.isfinite(got) == wanted if self.kind == "mask" else np.abs(got - wanted) <= error
            if not right.all():
                at = int(np.argmin(right))
                place = {name: int(x[at]) for name, x in points.items()}
                raise AssertionError(
                    f"group {self.seed}, function {n} at {place}, score {score[at, n]}: {got[at]} instead of "
                    f"{wanted[at]} (allowed: {error[at]:.3g})\n{to_text([graph.root])}"
                )


class BlockGroup:
    """As many functions, and the call of create_block_mask that compares their values with those in float64."""

    def __init__(self, seed: int, count: int, wild: bool) -> None:
        rng, build, self.seed = np.random.default_rng(seed), Builder(), seed
        self.captured, type = Captured(rng), "bool" if seed % 5 == 4 else "f32"
        indices = [build.input(name) for name in ("b", "q_idx", "kv_idx")]
        score = build.load(len(self.captured.tensors), "f32", indices)
        self.captured.tensors.append((rng.integers(-63, 64, SHAPE) / 4).astype(np.float32))
        self.graphs = [RandomGraph([seed, n], build, self.captured, type, score, wild, 100) for n in range(count)]
        at = np.ix_(*(np.arange(n, dtype=np.int32) for n in SHAPE))
        places = dict(zip(("b", "q_idx", "kv_idx"), at))
        places |= {"seqlen_q": SHAPE[1], "seqlen_k": SHAPE[2], "offset_q": 0, "offset_k": 0}
        wanted, errors = (np.zeros((count, *SHAPE)) for _ in range(2))
        for n, graph in enumerate(self.graphs):
            wanted[n], errors[n] = allowed(graph, {**places, "h": np.int32(n)}, self.captured, [seed, n])
        chosen = _of_heads(build, [graph.root for graph in self.graphs])
        number, place = len(self.captured.tensors), (build.input("h"), *indices)
        if type == "bool":
            self.captured.tensors.append(wanted.astype(bool))
            right = build("eq", chosen, build.load(number, "bool", place))
        else:
            self.captured.tensors += [(wanted - errors).astype(np.float32), (wanted + errors).astype(np.float32)]
            right = build("ge", chosen, build.load(number, "f32", place))
            right = build("and", right, build("le", chosen, build.load(number + 1, "f32", place)))
        self.root = right

    def run(self, moved: Moved, implementation: str | None = None) -> np.ndarray:
        """int32 (sequences, functions, query blocks): blocks of keys whose values are all right."""
        del implementation  # the tensors' device decides
        node, tensors, scalars = compact(self.root)
        native = native_of_text("mask", to_text([node]))
        shape = (SHAPE[0], len(self.graphs), *SHAPE[1:])
        blocks = (*shape[:2], *(n // BLOCK for n in SHAPE[1:]))
        lists = [moved(np.zeros(blocks[:n], np.int32)) for n in (3, 4, 3, 4)]
        given = [part for n in tensors for part in captured_argument(moved(self.captured.tensors[n]))]
        numbers = [float(self.captured.scalars[n]) for n in scalars]
        counts = len(tensors), len(numbers)
        _core.create_block_mask(native.handle, *shape, BLOCK, BLOCK, *lists, *counts, *given, *numbers)
        return lists[2]

    def check(self, full: np.ndarray) -> None:
        """full: as many blocks of each row as are right."""
        wrong = np.argwhere(full != SHAPE[2] // BLOCK)
        if len(wrong):
            b, n, row = (int(x) for x in wrong[0])
            raise AssertionError(
                f"group {self.seed}, function {n}, sequence {b}, queries from {row * BLOCK} on: "
                f"{len(wrong)} rows of blocks have wrong values\n{to_text([self.graphs[n].root])}"
            )


def _keeps_one(build: Builder, also: Node | None) -> Node:
    """Keeps key (5 q_idx + 3 b + 1) % seqlen_k, if `also` is true there."""
    terms = [build("mul", build.input(name), build.const("i32", n)) for name, n in (("q_idx", 5), ("b", 3))]
    place = build("add", build("add", *terms), build.const("i32", 1))
    kept = build("eq", build.input("kv_idx"), build("mod", place, build.input("seqlen_k")))
    return kept if also is None else build("and", kept, also)


def _points() -> dict[str, np.ndarray]:
    """What the rows of the call are asked for, in NumPy; `row` and `key` of the packed tensors."""
    columns: dict[str, list[int]] = {}
    first_row = first_key = 0
    for b, (rows, keys) in enumerate(LENGTHS):
        for q in range(rows):
            key = (5 * q + 3 * b + 1) % keys
            point = {"b": b, "q_idx": q, "kv_idx": key, "seqlen_q": rows, "seqlen_k": keys}
            point |= {"offset_q": first_row, "offset_k": first_key, "row": first_row + q, "key": first_key + key}
            for name, value in point.items():
                columns.setdefault(name, []).append(value)
        first_row, first_key = first_row + rows, first_key + keys
    return {name: np.array(values, np.int32) for name, values in columns.items()}


def compact(root: Node) -> tuple[Node, Sequence[int], Sequence[int]]:
    """The graph with its tensors and scalars numbered from 0, and which they were."""
    nodes = walk([root])
    numbers = {op: sorted({node.attributes[0] for node in nodes if node.op == op}) for op in ("load", "scalar")}
    build, new = Builder(), {}
    for node in nodes:
        attributes = node.attributes
        if node.op in numbers:
            attributes = (numbers[node.op].index(attributes[0]), *attributes[1:])
        new[id(node)] = build._node(node.op, node.type, tuple(new[id(x)] for x in node.operands), attributes)
    return new[id(root)], numbers["load"], numbers["scalar"]
