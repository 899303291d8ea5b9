"""Each public function through each of its doors, from one table of calls: NumPy, torch, torch_ops, torch_ops under
torch.compile, and the functions that replace vLLM's. test_every_function fails if no row calls a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flashspark
import ml_dtypes
import numpy as np
import pytest
from flash_attn_grid import Call, Case, compare, make
from reference import close, wide

try:
    import torch
    from torch_arrays import back, moved
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


@dataclass
class Row:
    """One call. check(results, arrays) gets what the call returned and its arrays afterwards, as NumPy arrays."""

    function: str
    check: Callable[[Any, dict[str, np.ndarray]], None]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    case: Case | None = None


def attention(case: Case, **more: Any) -> Row:
    """A point of flash-attention's grid, checked by the grid's oracle."""
    call = make(case)
    check = partial(_as_the_oracle, call)
    return Row(call.function, check, call.arrays, {**call.options, **more}, case)


def _as_the_oracle(call: Call, results: Any, arrays: dict[str, np.ndarray]) -> None:
    compare(call, results[0], results[1], {name: arrays[name] for name in call.caches})


def forward(case: Case) -> Row:
    """The same through _flash_attn_fwd, with its argument names."""
    row = attention(case)
    renamed = {"block_table": "page_table", "sinks": "learnable_sink"}
    arrays = {renamed.get(name, name): x for name, x in row.arrays.items()}
    options = dict(row.options)
    left, right = (None if side < 0 else side for side in options.pop("window_size"))
    options |= {"window_size_left": left, "window_size_right": right, "return_lse": options.pop("return_softmax_lse")}
    return Row("_flash_attn_fwd", row.check, arrays, options, case)


def packed(case: Case, of_queries: bool) -> Row:
    """The same through a packed form: of keys and values, or, where queries are as many, of all three by heads."""
    row = attention(case)
    arrays, options = dict(row.arrays), dict(row.options)
    q, k, v = (arrays.pop(name) for name in ("q", "k", "v"))
    name = row.function.removesuffix("func") + ("qkvpacked_func" if of_queries else "kvpacked_func")
    if not of_queries:
        return Row(name, row.check, {"q": q, "kv": np.stack([k, v], -3), **arrays}, options, case)
    for given, both in ((arrays, "cu_seqlens"), (options, "max_seqlen")):
        if f"{both}_q" in given:
            given[both] = given.pop(f"{both}_q")
            assert np.array_equal(given.pop(f"{both}_k"), given[both])
    options["num_heads_q"] = case.heads[0]
    return Row(name, row.check, {"qkv": np.concatenate([q, k, v], -2), **arrays}, options, case)


def biased(case: Case, **more: Any) -> Row:
    """A call with arguments that the grid's oracle does not know, compared with cpu-reference, which test_dense.py
    verifies."""
    call = make(case)
    arrays, options = {**call.arrays}, dict(call.options)
    for name, value in more.items():
        (arrays if isinstance(value, np.ndarray) else options)[name] = value
    function = getattr(flashspark, call.function)
    want = function(**{n: x.copy() for n, x in arrays.items()}, **options, implementation="cpu-reference")

    def check(results: Any, _: Any) -> None:
        dtype = "float8_e4m3fn" if "output_scale" in arrays else case.dtype
        close(wide(results[0]), wide(want[0]), dtype=dtype)
        close(wide(results[1]), wide(want[1]), dtype="float16", what="lse")

    return Row(call.function, check, arrays, options, case)


def append(case: Case) -> Row:
    """The first half of flash_attn_with_kvcache: rows are written to the cache, q is rotated in place."""
    call = make(case)
    names = ("k", "v", "k_cache", "v_cache", "cache_seqlens", "cu_seqlens_k_new", "block_table", "cache_batch_idx")
    turning = ("q", "rotary_cos", "rotary_sin", "rotary_seqlens", "cu_seqlens_q") if case.rotary else ()
    arrays = {name: call.arrays[name] for name in (*names, *turning) if name in call.arrays}
    options = {"rotary_interleaved": case.interleaved} if case.rotary else {}
    before = arrays["q"].copy() if case.rotary else None

    def check(_: Any, after: dict[str, np.ndarray]) -> None:
        for name, want in call.caches.items():
            got = wide(after[name])
            assert (np.isnan(got) == np.isnan(want)).all(), name
            close(np.nan_to_num(got), np.nan_to_num(want), dtype=case.dtype, what=name)
        if before is not None:
            assert (wide(after["q"]) != wide(before)).any(), "q has not turned"

    return Row("append_kv", check, arrays, options)


def slots() -> Row:
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((5, 2, 32)).astype(np.float32) for _ in range(2))
    cache = {name: np.zeros((3, 7, 2, 32), np.float32) for name in ("k_cache", "v_cache")}
    slot_mapping = np.array([20, -1, 3, 7], np.int64)

    def check(_: Any, after: dict[str, np.ndarray]) -> None:
        for name, rows in (("k_cache", k), ("v_cache", v)):
            want = np.zeros((21, 2, 32), np.float32)
            want[[20, 3, 7]] = rows[[0, 2, 3]]
            np.testing.assert_array_equal(after[name].reshape(21, 2, 32), want)

    return Row("append_kv", check, {"k": k, "v": v, **cache, "slot_mapping": slot_mapping})


def schedule() -> Row:
    """On a CPU there is no scheduler metadata: the result is an empty int32 array."""
    sizes = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 90, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64}

    def check(results: Any, _: Any) -> None:
        assert results.shape == (0,) and results.dtype == np.int32

    return Row("get_scheduler_metadata", check, {"cache_seqlens": np.array([40, 90], np.int32)}, sizes)


def explained() -> Row:
    q = np.zeros((1, 2, 2, 16), np.float32)

    def check(results: Any, _: Any) -> None:
        assert "chosen" in results

    return Row("attention_explain", check, {"q": q, "k": q, "v": q}, {"function": flashspark.flash_attn_func})


def fact(function: str, kind: type) -> Row:
    def check(results: Any, _: Any) -> None:
        assert isinstance(results, kind) and results

    return Row(function, check)


def ranges(case: Case) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.sort(rng.integers(0, case.longest[1], (case.batch, 2, 2)), axis=-1).astype(np.int32)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


SMALL = Case(longest=(9, 21), dims=(32, 32), dtype="float32", heads=(4, 2))
PACKED = Case("varlen", **{n: getattr(SMALL, n) for n in ("longest", "dims", "dtype", "heads")}, batch=3)
CACHE = Case("cache", longest=(3, 40), dims=(32, 32), dtype="float32", heads=(4, 2))


TABLE: dict[str, Callable[[], Row]] = {
    "dense": lambda: attention(SMALL),
    "dense causal bf16 given": lambda: attention(replace(SMALL, causal=True, dtype="bfloat16", given=2)),
    "dense window softcap sinks": lambda: attention(replace(SMALL, window=(5, 2), softcap=15.0, sinks=True)),
    "dense alibi fp16": lambda: attention(replace(SMALL, alibi=1, causal=True, dtype="float16", dims=(64, 32))),
    "dense fp8": lambda: attention(replace(SMALL, dtype="float8_e4m3fn", causal=True)),
    "dense chunk": lambda: attention(replace(SMALL, chunk=6, causal=True)),
    "dense 59": lambda: attention(replace(SMALL, dims=(59, 59), given=1)),
    "dense deterministic": lambda: attention(replace(SMALL, deterministic=True, num_splits=3, scale=0.2)),
    "dense biased": lambda: biased(SMALL, rel_logits=normal(2, 9, 4, 6), causal=True),
    "dense e4m3 out": lambda: biased(replace(SMALL, dtype="bfloat16"), output_scale=np.full(1, 0.01, np.float32)),
    "dense ranges": lambda: biased(replace(SMALL, causal=True), prefix_ranges=ranges(SMALL)),
    "dense in use": lambda: biased(SMALL, seqused_k=np.array([3, 21], np.int32), seqused_q=np.array([9, 9], np.int32)),
    "dense dropout": lambda: biased(replace(SMALL, causal=True), dropout_p=0.25, rng_state=np.array([2**40, -3])),
    "varlen": lambda: attention(replace(PACKED, causal=True)),
    "varlen dropout": lambda: biased(PACKED, dropout_p=0.5, rng_state=np.array([1, 2], np.uint64)),
    "varlen zero unused": lambda: attention(replace(PACKED, lengths="zero", unused=True, given=1)),
    "varlen alibi window": lambda: attention(replace(PACKED, alibi=2, window=(4, 0))),
    "varlen fp8": lambda: attention(replace(PACKED, dtype="float8_e4m3fn", causal=True)),
    "varlen paged": lambda: attention(replace(PACKED, page_size=16, causal=True, sinks=True)),
    "varlen paged of 5": lambda: attention(replace(PACKED, page_size=5, dtype="bfloat16", chunk=7, causal=True)),
    "varlen paged fp8": lambda: attention(replace(PACKED, page_size=16, dtype="float8_e4m3fn", window=(9, 0))),
    "varlen r-swa": lambda: biased(
        replace(PACKED, causal=True), rswa_prefix_lens=np.array([2, 0, 4], np.int32), rswa_window=5
    ),
    "varlen causal_per_seq": lambda: biased(PACKED, causal_per_seq=np.array([1, 0, 1], np.int32)),
    "cache": lambda: attention(replace(CACHE, causal=True)),
    "cache appended": lambda: attention(replace(CACHE, new=3, causal=True)),
    "cache appended turned": lambda: attention(replace(CACHE, new=3, rotary=1.0, causal=True)),
    "cache turned as one": lambda: attention(replace(CACHE, new=2, rotary=0.5, interleaved=True, rotary_seqlens=True)),
    "cache paged": lambda: attention(replace(CACHE, page_size=16, new=1, rotary=0.5, window=(9, 0))),
    "cache paged of 1 idx": lambda: attention(replace(CACHE, page_size=1, new=3, batch_idx=True, causal=True)),
    "cache leftpad idx": lambda: attention(
        replace(CACHE, leftpad=True, batch_idx=True, new=3, rotary=1.0, causal=True)
    ),
    "cache varlen": lambda: attention(replace(CACHE, varlen_q=True, new=2, rotary=1.0, causal=True, page_size=4)),
    "cache fp8": lambda: attention(replace(CACHE, dtype="float8_e4m3fn", causal=True, sinks=True, page_size=16)),
    "cache softcap alibi": lambda: attention(replace(CACHE, softcap=15.0, alibi=2, chunk=9, num_splits=4)),
    "kv packed": lambda: packed(replace(SMALL, causal=True, softcap=15.0), False),
    "qkv packed": lambda: packed(replace(SMALL, longest=(9, 9), window=(5, 2)), True),
    "kv packed varlen": lambda: packed(replace(PACKED, sinks=True, given=1), False),
    "qkv packed varlen": lambda: packed(replace(PACKED, longest=(9, 9), lengths="full", alibi=1, causal=True), True),
    "fwd dense": lambda: forward(replace(SMALL, causal=True)),
    "fwd varlen": lambda: forward(replace(PACKED, window=(4, 0), softcap=15.0)),
    "fwd paged": lambda: forward(replace(PACKED, page_size=16, sinks=True, causal=True, given=1)),
    "fwd fp8": lambda: forward(replace(PACKED, dtype="float8_e4m3fn", page_size=16)),
    "append": lambda: append(replace(CACHE, new=3)),
    "append turned": lambda: append(replace(CACHE, new=3, rotary=1.0, page_size=4, batch_idx=True, causal=True)),
    "append varlen": lambda: append(replace(CACHE, new=3, rotary=0.5, varlen_q=True, interleaved=True, causal=True)),
    "append slots": slots,
    "schedule": schedule,
    "explain": explained,
    "cpu_target": lambda: fact("cpu_target", str),
    "cpu_threads": lambda: fact("cpu_threads", int),
    "implementations": lambda: fact("implementations", dict),
    "native_version": lambda: fact("native_version", str),
}  # fmt: skip


def by_numpy(row: Row) -> tuple[Any, dict]:
    arrays = {name: x.copy() for name, x in row.arrays.items()}
    return getattr(flashspark, row.function)(**arrays, **row.options), arrays


def _with_torch(
    row: Row, function: Callable[..., Any], keep: Callable[[str], bool] = lambda _: True
) -> tuple[Any, dict]:
    arrays = {name: moved(x) for name, x in row.arrays.items() if keep(name)}
    results = function(**arrays, **row.options)
    if isinstance(results, torch.Tensor):
        results = back(results)
    elif isinstance(results, tuple):
        results = tuple(None if x is None else back(x) for x in results)
    return results, {name: back(x) for name, x in arrays.items()}


def by_torch(row: Row) -> tuple[Any, dict]:
    return _with_torch(row, getattr(flashspark, row.function))


def by_operator(row: Row) -> tuple[Any, dict]:
    from flashspark import torch_ops

    return _with_torch(row, getattr(torch_ops, row.function))


def compiled(row: Row, backend: str = "aot_eager") -> tuple[Any, dict]:
    from flashspark import torch_ops

    torch._dynamo.reset()
    function = getattr(torch_ops, row.function)
    graph = torch.compile(function, fullgraph=True, backend=backend)
    return _with_torch(row, graph)


def stock(q, k, v, max_seqlen_q=None, cu_seqlens_q=None, max_seqlen_k=None, cu_seqlens_k=None, **_: Any) -> Any:
    raise AssertionError("vLLM's own function was called")


def _vllm(row: Row, function: Callable[..., Any], renamed: dict[str, str], **more: Any) -> tuple[Any, dict]:
    """vLLM's call takes no lse from the caller and has neither deterministic nor num_threads in our sense."""
    options = {renamed.get(n, n): x for n, x in row.options.items() if n != "deterministic"}
    arrays = {renamed.get(n, n): x for n, x in row.arrays.items() if n != "lse"}
    return _with_torch(Row(row.function, row.check, arrays, {**options, **more}), function)


def by_vllm(row: Row) -> tuple[Any, dict]:
    from flashspark.vllm import attention

    return _vllm(row, attention.varlen(stock), {"sinks": "s_aux"}, fa_version=4)


def by_vllm_cute(row: Row) -> tuple[Any, dict]:
    from flashspark.vllm import attention

    renamed = {"sinks": "learnable_sink", "block_table": "page_table", "return_softmax_lse": "return_lse"}
    return _vllm(row, attention.cute_varlen(stock), renamed)


OPERATORS = (
    *("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "append_kv"),
    *("flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"),
    *("flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func"),
)
# What vLLM's calls do not offer.
FOREIGN = {"dropout_p", "attention_chunk", "rel_logits", "prefix_ranges", "rswa_window", "causal_per_seq"}
DOORS: dict[str, tuple[Callable[[Row], Any], tuple[str, ...] | None]] = {  # and the functions that have it
    "numpy": (by_numpy, None),
    "torch": (by_torch, (*OPERATORS, "_flash_attn_fwd", "get_scheduler_metadata", "attention_explain")),
    "operator": (by_operator, OPERATORS),
    "compiled": (compiled, OPERATORS),
    "vllm": (by_vllm, ("flash_attn_varlen_func",)),
    "vllm cute": (by_vllm_cute, ("flash_attn_varlen_func",)),
}


def passes(row: Row, door: str) -> bool:
    functions = DOORS[door][1]
    if functions is not None and row.function not in functions:
        return False
    return not (door.startswith("vllm") and FOREIGN & {*row.arrays, *row.options})


ROWS = {name: build() for name, build in TABLE.items()}
CALLS = [(name, door) for name, row in ROWS.items() for door in DOORS if passes(row, door)]
PARAMETERS = [pytest.param(*c, id=f"{c[0]}-{c[1]}", marks=[] if c[1] == "numpy" else needs_torch) for c in CALLS]


@pytest.mark.parametrize(("name", "door"), PARAMETERS)
def test_call(name, door):
    row = ROWS[name]
    row.check(*DOORS[door][0](row))


@needs_torch
@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.function in OPERATORS])
def test_without_memory(name, device):
    """torch_ops gives the same shapes, dtypes and devices for meta tensors as for real ones."""
    from flashspark import torch_ops
    from torch._subclasses.fake_tensor import FakeTensorMode

    row = ROWS[name]
    function = getattr(torch_ops, row.function)
    real = function(**{n: moved(x) for n, x in row.arrays.items()}, **row.options)
    if device == "meta":
        got = function(**{n: moved(x).to("meta") for n, x in row.arrays.items()}, **row.options)
    else:
        mode = FakeTensorMode()
        arrays = {n: mode.from_tensor(moved(x)) for n, x in row.arrays.items()}
        with mode:
            got = function(**arrays, **row.options)
    if real is None:
        assert got is None
        return
    for x, want in zip(got, real, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (want.shape, want.dtype, want.stride())
        assert x.device.type == ("meta" if device == "meta" else "cpu")


# FlexAttention's names, which have test files of their own.
FLEX = {
    *("BlockMask", "BlockSparseTensors", "TraceError", "and_masks", "create_block_mask", "flex_attention"),
    *("flex_explain", "noop_mask", "or_masks"),
}


# They take what a forward call gave: test_backward.py.
BACKWARD = {"flash_attn_backward", "flash_attn_varlen_backward"}


def test_every_function():
    called = {row.function for row in ROWS.values()}
    public = {name for name in flashspark.__all__ if callable(getattr(flashspark, name))} | {"_flash_attn_fwd"}
    assert public - called == FLEX | BACKWARD
    for door, (_, functions) in DOORS.items():
        through = {ROWS[name].function for name, d in CALLS if d == door}
        assert through == (called if functions is None else set(functions)), door


@needs_torch
def test_every_operator():
    """torch_ops has no function that OPERATORS omits."""
    from flashspark import torch_ops

    own = {n for n, x in vars(torch_ops).items() if n in flashspark.__all__ or n == "_flash_attn_fwd"}
    assert {n for n in own if callable(getattr(torch_ops, n))} == set(OPERATORS)


@needs_torch
def test_compiled_by_inductor():
    row = ROWS["cache appended turned"]
    row.check(*compiled(row, "inductor"))


@needs_torch
def test_types_of_ml_dtypes_come_back():
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        x = np.array([1.5, -0.25], dtype)
        np.testing.assert_array_equal(back(moved(x)), x.astype(np.float32))
