"""The matrix of functions, layouts, masks and block lists: its cases, and each case's call and truth in float64.

test_flex_matrix.py runs a sample on the CPU, tests/gpu/test_flex_matrix.py all of it on a GPU. What the GPU compiles
is bounded by a test: a kernel belongs to a function, with or without mask function and lists, for many rows, few rows
or e4m3 keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import flashspark
import ml_dtypes
import numpy as np
from flex_matrix_functions import MASKS, SCORES, captured, named
from flex_reference import attend, kept_by_lists, lists_of, places
from problems import offsets, pages

LAYOUTS = {  # layout -> the kind of kernel
    **dict.fromkeys(("flex", "dense", "gqa", "varlen", "paged"), "many rows"),
    **{"split": "few rows", "decode": "few rows", "fp8": "e4m3", "fp8 paged": "e4m3"},
}
BLOCK = 128
# Arguments of FlashAttention's masks, and which keys they keep: i, j count from 0, pos is the query's place among keys.
PLAIN_MASKS: dict[str, tuple[dict[str, Any], Callable[..., Any] | None]] = {
    "none": ({}, None),
    "causal": ({"causal": True}, lambda i, j, pos: j <= pos),
    "window": ({"window_size": (90, 30)}, lambda i, j, pos: (pos - j <= 90) & (j - pos <= 30)),
}
_VARIANTS = [
    (kind, mask_mod, lists)
    for kind in ("many rows", "few rows", "e4m3")
    for mask_mod in (False, True)
    for lists in (False, True)
]
_VARIANTS_EACH = 6  # of the twelve, for one function


@dataclass(frozen=True)
class Case:
    score: str
    layout: str
    mask: str  # of PLAIN_MASKS, or "mask_mod"
    lists: bool

    @property
    def number(self) -> int:
        return list(SCORES).index(self.score)

    @property
    def mask_mod(self) -> Callable[..., Any] | None:
        return MASKS[self.number % len(MASKS)] if self.mask == "mask_mod" else None

    @property
    def width(self) -> int:
        return 64 if self.number % 3 else 128

    @property
    def dtype(self) -> Any:
        return np.float16 if self.number % 4 == 3 else ml_dtypes.bfloat16

    @property
    def kernel(self) -> tuple[Any, ...]:
        """What one compiled kernel serves, as long as a layout is served by one tiling."""
        return self.score, LAYOUTS[self.layout], self.mask == "mask_mod", self.lists

    def __str__(self) -> str:
        return f"f{self.number:02}-{self.score}-{self.layout}-{self.mask}{'-lists' if self.lists else ''}"


def cases_of(score: str) -> list[Case]:
    """A function's cases: many rows without mask function and lists, and five more of the twelve variants in turn."""
    number = list(SCORES).index(score)
    chosen = [_VARIANTS[0]] + [
        _VARIANTS[1 + (number * (_VARIANTS_EACH - 1) + i) % (len(_VARIANTS) - 1)] for i in range(_VARIANTS_EACH - 1)
    ]
    return [
        Case(score, layout, mask, lists)
        for kind, mask_mod, lists in chosen
        for mask in (("mask_mod",) if mask_mod else PLAIN_MASKS)
        for layout in (name for name, of in LAYOUTS.items() if of == kind)
        # flex_attention has no masks but functions; the cache's function takes no lists.
        if not (layout == "flex" and (mask == "window" or (lists and mask == "causal")))
        if not (layout == "fp8 paged" and lists)
    ]


CASES = [case for score in SCORES for case in cases_of(score)]


@dataclass
class Sequence:
    """One sequence of a call, for the oracle: tensors (1, heads, tokens, width), and rows of the result."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    lengths: SimpleNamespace
    result: tuple[Any, ...]  # of out and lse brought to (sequences or 1, heads, tokens): (index of a sequence, rows)


@dataclass
class Call:
    """arrays and options are keyword arguments of `function`."""

    case: Case
    function: str
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    sequences: list[Sequence]
    kinds: np.ndarray | None  # of the lists' blocks: 0 not listed, 1 asks the mask function, 2 keeps all
    lists: list[np.ndarray] = field(default_factory=list)
    sizes: tuple[int, int] = (0, 0)  # of the longest sequence


# Rows and keys of each sequence, by layout's kind: on a GPU, and smaller ones for the CPU.
LARGE = {"many rows": [(270, 390), (129, 64), (31, 257)], "few rows": [(5, 1500), (1, 777), (3, 40)]}
SMALL = {"many rows": [(131, 260), (17, 9), (31, 150)], "few rows": [(3, 400), (1, 277), (2, 40)]}


def make(case: Case, sizes: dict[str, list[tuple[int, int]]]) -> Call:
    rng = np.random.default_rng([case.number, list(LAYOUTS).index(case.layout), len(case.mask), case.lists])
    kind = LAYOUTS[case.layout]
    lengths = sizes["many rows" if kind == "e4m3" else kind]
    packed = case.layout in ("varlen", "paged", "fp8 paged") or kind == "few rows"
    if not packed:
        lengths = lengths[:1] * 2
    heads = (3, 3) if case.layout in ("flex", "dense", "varlen") else (6, 2) if kind != "few rows" else (8, 2)
    if case.layout == "flex" and case.number % 2:
        heads = (4, 2)
    tensors = [_tensors(rng, case, heads, rows, keys) for rows, keys in lengths]
    call = Call(case, "", {}, {}, [], None, sizes=(max(r for r, _ in lengths), max(k for _, k in lengths)))
    if case.lists:
        _add_lists(rng, call, len(lengths), heads[0])
    _LAID_OUT[case.layout](rng, call, tensors)
    wide = [x.astype(np.float64) for x in (call.arrays[f"{n}_descale"] for n in "kv")] if kind == "e4m3" else None
    for b, (q, k, v) in enumerate(tensors):
        info = SimpleNamespace(seqlen_q=len(q), seqlen_k=len(k), offset_q=0, offset_k=0)
        at = (b, slice(0, len(q)))
        if packed:
            info.offset_q = sum(r for r, _ in lengths[:b])
            info.offset_k = sum(n for _, n in lengths[:b]) * (case.layout == "varlen")
            at = (0, slice(info.offset_q, info.offset_q + len(q)))
        if wide is not None:
            k, v = (x.astype(np.float64) * scale[b][:, None] for x, scale in zip((k, v), wide))  # noqa: PLW2901
        call.sequences.append(Sequence(*(x.transpose(1, 0, 2)[None] for x in (q, k, v)), info, at))
    return call


def _tensors(rng, case: Case, heads: tuple[int, int], rows: int, keys: int) -> list[np.ndarray]:
    kv = ml_dtypes.float8_e4m3fn if LAYOUTS[case.layout] == "e4m3" else case.dtype
    shapes = ((rows, heads[0]), case.dtype), ((keys, heads[1]), kv), ((keys, heads[1]), kv)
    return [rng.standard_normal((*shape, case.width)).astype(dtype) for shape, dtype in shapes]


def _add_lists(rng, call: Call, batch: int, heads: int) -> None:
    """Blocks of any kind at any place; the last block of rows of the first sequence sees none."""
    rows, keys = (-(-size // BLOCK) for size in call.sizes)
    shape = (batch if rng.random() < 0.5 else 1, heads if rng.random() < 0.5 else 1, rows, keys)
    call.kinds = rng.integers(0, 3, shape)
    if rows > 1:
        call.kinds[0, :, -1] = 0
    call.lists = [x for kind in (1, 2) for x in lists_of(rng, call.kinds, kind)]


def _flex(rng, call: Call, tensors: list[list[np.ndarray]]) -> None:
    call.function = "flex_attention"
    stacked = (np.stack([x[i].transpose(1, 0, 2) for x in tensors]) for i in range(3))
    call.arrays = dict(zip(("query", "key", "value"), stacked))
    call.options = {"enable_gqa": True, "return_lse": True}


def _dense(rng, call: Call, tensors: list[list[np.ndarray]]) -> None:
    call.function = "flash_attn_func"
    call.arrays = {name: np.stack([x[i] for x in tensors]) for i, name in enumerate("qkv")}
    call.options = {"return_softmax_lse": True}


def _fp8(rng, call: Call, tensors: list[list[np.ndarray]]) -> None:
    _dense(rng, call, tensors)
    _descale(rng, call, tensors)


def _varlen(rng, call: Call, tensors: list[list[np.ndarray]]) -> None:
    call.function = "flash_attn_varlen_func"
    call.arrays = {name: np.concatenate([x[i] for x in tensors]) for i, name in enumerate("qkv")}
    for i, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
        call.arrays[name] = offsets([len(x[i]) for x in tensors])
    call.options = {**dict(zip(("max_seqlen_q", "max_seqlen_k"), call.sizes)), "return_softmax_lse": True}


def _paged(rng, call: Call, tensors: list[list[np.ndarray]]) -> None:
    """Pages through the function of packed queries, and where there are no lists, by turns through the cache's."""
    k, v, table = pages(rng, *([x[i] for x in tensors] for i in (1, 2)), 16 if call.case.number % 2 else 64)
    _varlen(rng, call, tensors)
    used = np.diff(call.arrays.pop("cu_seqlens_k"))
    if call.case.lists or call.case.number % 2:
        call.arrays.update(k=k, v=v, block_table=table, seqused_k=used)
        call.options["cu_seqlens_k"] = None
    else:
        call.function = "flash_attn_with_kvcache"
        call.arrays = {"q": call.arrays["q"], "cu_seqlens_q": call.arrays["cu_seqlens_q"]}
        call.arrays.update(k_cache=k, v_cache=v, block_table=table, cache_seqlens=used)


def _fp8_paged(rng, call: Call, tensors: list[list[np.ndarray]]) -> None:
    _paged(rng, call, tensors)
    _descale(rng, call, tensors)


def _few_rows(splits: int) -> Callable[..., None]:
    def lay_out(rng, call: Call, tensors: list[list[np.ndarray]]) -> None:
        _paged(rng, call, tensors)
        call.options["num_splits"] = splits

    return lay_out


def _descale(rng, call: Call, tensors: list[list[np.ndarray]]) -> None:
    for name in ("k_descale", "v_descale"):
        call.arrays[name] = (rng.random((len(tensors), tensors[0][1].shape[1])) * 0.5 + 0.5).astype(np.float32)


_LAID_OUT = {
    **{"flex": _flex, "dense": _dense, "gqa": _dense, "varlen": _varlen, "paged": _paged, "fp8": _fp8},
    **{"fp8 paged": _fp8_paged, "split": _few_rows(3), "decode": _few_rows(0)},
}


def run(call: Call, moved: Callable[[np.ndarray], Any], implementation: str | None = None) -> tuple[Any, Any]:
    """out and lse. moved: brings an array to where the call is to be computed."""
    case, arrays = call.case, {name: moved(x) for name, x in call.arrays.items()}
    options = {**call.options, "implementation": implementation}
    aux, lists = [moved(x) for x in captured().values()], [moved(x) for x in call.lists]
    score, mask = SCORES[case.score], case.mask_mod
    if case.layout == "flex":
        options["score_mod"], options["block_mask"] = _flex_functions(call, named(aux), score, mask, lists, moved)
        return flashspark.flex_attention(**arrays, **options)

    def score_mod(s, b, h, q, k, info, aux):
        return score(named(aux), s, b, h, q, k, info)

    def mask_mod(b, h, q, k, info, aux):
        return mask(named(aux), b, h, q, k, info)

    if case.mask != "mask_mod":
        options.update(PLAIN_MASKS[case.mask][0])
    if lists:
        options["block_sparse_tensors"] = flashspark.BlockSparseTensors(*lists, (BLOCK, BLOCK))
    function = getattr(flashspark, call.function)
    return function(**arrays, **options, score_mod=score_mod, mask_mod=mask and mask_mod, aux_tensors=aux)


def _flex_functions(call: Call, t: SimpleNamespace, score, mask, lists: list[Any], moved) -> tuple[Any, Any]:
    n = call.sequences[0].lengths

    def score_mod(s, b, h, q, k):
        return score(t, s, b, h, q, k, n)

    def mask_mod(b, h, q, k):
        return mask(t, b, h, q, k, n)

    def causal(b, h, q, k):
        return q + (n.seqlen_k - n.seqlen_q) >= k

    wanted = causal if call.case.mask == "causal" else mask and mask_mod
    if lists:
        # Transposed lists are those of a backward pass.
        lengths = {"seq_lengths": call.sizes, "compute_q_blocks": False}
        return score_mod, flashspark.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=wanted, **lengths)
    if wanted is None:
        return score_mod, None
    x = moved(np.zeros(1, np.float32))
    device = "numpy" if isinstance(x, np.ndarray) else str(x.device)
    batch, heads = call.arrays["query"].shape[:2]
    return score_mod, flashspark.create_block_mask(wanted, batch, heads, *call.sizes, device=device)


def compare(call: Call, out: np.ndarray, lse: np.ndarray) -> None:
    """Asserts that both are as near to float64 as attention that rounds between its steps, within a factor of two.

    Asked of the whole call, since a few numbers alone could all be rounded well by chance.
    """
    if call.case.layout != "flex":  # (tokens, heads, width) or (sequences, tokens, heads, width), lse (heads, tokens)
        out = out.transpose(0, 2, 1, 3) if out.ndim == 4 else out.transpose(1, 0, 2)[None]
        lse = lse if lse.ndim == 3 else lse[None]
    worst = {name: [0.0, 0.0] for name in ("out", "lse")}  # name -> [our error, that of the other]
    for b, sequence in enumerate(call.sequences):
        at, rows = sequence.result
        got = out[at : at + 1, :, rows].astype(np.float64), lse[at : at + 1, :, rows].astype(np.float64)
        want, rounded = (_attend(call, b, sequence, through) for through in (None, call.case.dtype))
        kept = np.isfinite(want[1])
        assert (np.isfinite(got[1]) == kept).all(), f"sequence {b}: lse is finite elsewhere"
        assert (got[0][~kept] == 0).all() and (got[1][~kept] == -np.inf).all(), f"sequence {b}: rows without keys"
        for name, x, y, z in zip(worst, got, want, rounded):
            for place, value in enumerate((x, z)):
                error = np.abs(value[kept] - y[kept]).max(initial=0)
                assert not np.isnan(error), f"sequence {b}: {name} has NaN"
                worst[name][place] = max(worst[name][place], float(error))
    for name, (ours, other) in worst.items():
        assert ours <= 2 * other + 1e-5, f"{name}: the error is {ours:.3g}, unfused it is {other:.3g}"


def _attend(call: Call, b: int, sequence: Sequence, through: Any) -> tuple[np.ndarray, np.ndarray]:
    case, t, n = call.case, named(captured().values()), sequence.lengths

    def score_mod(s, _, h, q, k):
        return SCORES[case.score](t, s, np.int32(b), h, q, k, n)

    return attend(sequence.q, sequence.k, sequence.v, score_mod, _kept(call, b, sequence), None, through)


def _kept(call: Call, b: int, sequence: Sequence) -> np.ndarray:
    case, t, n = call.case, named(captured().values()), sequence.lengths
    sizes = (1, sequence.q.shape[1], n.seqlen_q, n.seqlen_k)
    mask = case.mask_mod and (lambda _, h, q, k: case.mask_mod(t, np.int32(b), h, q, k, n))
    if call.kinds is not None:
        kinds = call.kinds[b % len(call.kinds)][None]
        keep = kept_by_lists(kinds, (BLOCK, BLOCK), mask, *sizes)
    else:
        keep = np.ones(sizes, bool) if mask is None else np.broadcast_to(mask(*places(*sizes)), sizes)
    plain = PLAIN_MASKS.get(case.mask, ({}, None))[1]
    if plain is not None:
        _, _, q, k = places(*sizes)
        keep = keep & plain(q, k, q + n.seqlen_k - n.seqlen_q)
    return keep


@functools.cache
def operations() -> set[str]:
    """Every operation, type of captured tensor and rank that the functions' graphs have."""
    from flashspark._trace import trace

    found: set[str] = set()
    aux = list(captured().values())
    for kind, functions in (("score", SCORES.values()), ("mask", MASKS)):
        for function in functions:
            if kind == "score":
                mod = lambda s, b, h, q, k, n, aux: function(named(aux), s, b, h, q, k, n)  # noqa: E731, B023
            else:
                mod = lambda b, h, q, k, n, aux: function(named(aux), b, h, q, k, n)  # noqa: E731, B023
            for line in trace(mod, kind, "fa4", aux).text.splitlines()[1:-1]:
                words = line.split()
                found.add(words[0])
                if words[0] == "load":
                    found |= {f"load {words[2]}", f"rank {words[3]}"}
    return found
