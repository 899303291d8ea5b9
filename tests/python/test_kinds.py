"""Every argument of every function with values of wrong kinds: the call gives a right result, or raises ValueError,
TypeError or NotImplementedError that names the argument, before anything is written. The kinds are those of
bindings/signature.def."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import flashspark
import numpy as np
import pytest
import wrong_kinds
from flash_attn_grid import Case, make
from flashspark._signature import APPEND, ATTENTION, SCHEDULE, TENSORS

try:
    import torch
    from torch_arrays import moved
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
ALLOWED = (ValueError, TypeError, NotImplementedError)
WRITTEN = ("out", "lse", "k_cache", "v_cache")

SMALL = Case(longest=(3, 9), dims=(16, 16), dtype="float32", heads=(2, 1), given=2)
PACKED = replace(SMALL, kind="varlen")
CACHE = replace(SMALL, kind="cache", new=2, rotary=1.0, causal=True, page_size=4)
BASES: dict[str, Case] = {
    "dense": replace(SMALL, sinks=True, alibi=1),
    "varlen": replace(PACKED, unused=True),
    "paged": replace(PACKED, page_size=4),
    "cache": replace(CACHE, batch_idx=True, leftpad=True),
    "cache varlen": replace(CACHE, varlen_q=True, rotary_seqlens=True),
    "forward": replace(PACKED, page_size=4, sinks=True),
    "append": CACHE,
}
# Kinds of arguments that signature.def does not list, or that a function takes under another name.
KINDS = {
    **dict(zip(ATTENTION.words[0], ATTENTION.kinds)),
    **dict(zip(ATTENTION.words[1], ATTENTION.kinds)),
    **dict(zip(ATTENTION.words[2], ATTENTION.kinds)),
    **{n: k for n, k in zip(APPEND.names, APPEND.kinds) if n not in ("q", "k", "v")},
    **dict.fromkeys(("block_table", "page_table", "cache_seqlens", "cu_seqlens_k_new", "rotary_seqlens"), "ints"),
    **dict.fromkeys(("sinks", "s_aux", "learnable_sink", "rotary_cos", "rotary_sin"), "floats"),
    **dict.fromkeys(("return_softmax_lse", "return_lse", "return_attn_probs", "strict", "compile_only"), "flag"),
    "window_size": "window",
}
FREE = {
    "pack_gqa",
    "sm_margin",
    "explain",
    "knobs",
    "score_mod",
    "mask_mod",
    "aux_tensors",
    "rng_state",  # may be a tuple, too: test_errors.py
}  # any value, or not determined by kinds
# If two arguments do not match each other, the error may name the other one.
TOGETHER = [
    {"q", "k", "v", "out", "lse", "k_cache", "v_cache", "num_heads", "head_dim"},
    {"q", "cu_seqlens_q", "seqused_q", "max_seqlen_q", "out", "lse", "rotary_cos"},
    {"k", "v", "cu_seqlens_k", "seqused_k", "max_seqlen_k", "block_table", "page_table", "cu_seqlens_k_new"},
    {
        "k",
        "v",
        "k_cache",
        "v_cache",
        "cache_seqlens",
        "cu_seqlens_k_new",
        "block_table",
        "page_table",
        "cache_batch_idx",
    },
    {"cache_seqlens", "cache_leftpad", "block_table", "page_table", "rotary_seqlens", "rotary_cos", "rotary_sin"},
    {"sinks", "s_aux", "learnable_sink"},
    {"cu_seqlens_q", "cu_seqlens_k_new", "cu_seqlens_k", "cache_seqlens", "seqused_q"},
    {"block_table", "page_table", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "cache_seqlens", "cache_batch_idx"},
    {"rswa_window", "rswa_prefix_lens", "prefix_ranges", "window_size", "causal", "prefix_clamp_window"},
    {"q", "rel_logits", "alibi_slopes", "causal_per_seq", "prefix_ranges", "out", "output_scale"},
    {"q", "q_descale", "k_descale", "v_descale", "kv_batch_index", "cu_seqlens_q"},
    {"slot_mapping", "rotary_positions", "rotary_cos", "rotary_sin", "cache_seqlens", "k", "q", "k_descale"},
]


def base(name: str) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """(function, arrays, options) of a valid call."""
    if name == "schedule":
        sizes = {
            "batch_size": 2,
            "max_seqlen_q": 1,
            "max_seqlen_k": 9,
            "num_heads_q": 2,
            "num_heads_kv": 1,
            "headdim": 16,
        }
        return "get_scheduler_metadata", {"cache_seqlens": np.array([4, 9], np.int32)}, sizes
    if name == "slots":
        rng = np.random.default_rng(1)
        rows = {n: rng.standard_normal((3, 1, 16)).astype(np.float32) for n in "kv"}
        cache = {n: np.zeros((2, 4, 1, 16), np.float32) for n in ("k_cache", "v_cache")}
        return "append_kv", {**rows, **cache, "slot_mapping": np.array([5, -1, 2])}, {}
    call = make(BASES[name])
    arrays, options = dict(call.arrays), dict(call.options)
    if name == "append":
        names = {*inspect.signature(flashspark.append_kv).parameters} - {"out", "lse"}
        return "append_kv", {n: x for n, x in arrays.items() if n in names}, {}
    if name == "forward":
        renamed = {"block_table": "page_table", "sinks": "learnable_sink"}
        arrays = {renamed.get(n, n): x for n, x in arrays.items()}
        options = {n: x for n, x in options.items() if n not in ("window_size", "return_softmax_lse")}
        return "_flash_attn_fwd", arrays, options
    return call.function, arrays, options


def parameters(function: str) -> list[str]:
    """The arguments whose value matters."""
    names = inspect.signature(getattr(flashspark, function)).parameters
    return [n for n in names if n[:1] != "_" and n not in FREE and kind_of(function, n) != "ignored"]


def kind_of(function: str, name: str) -> str:
    if function == "get_scheduler_metadata":
        return dict(zip(SCHEDULE.names, SCHEDULE.kinds)).get(name) or ("window" if name == "window_size" else "ignored")
    if function == "append_kv" and name == "q":
        return "result"
    return KINDS.get(name, "ignored")


def template(kind: str, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The argument's value in the valid call, or a similar one."""
    return arrays.get(name, np.zeros(2, np.int32) if kind == "ints" else np.ones(2, np.float32))


def is_named(error: Exception, name: str) -> bool:
    text = str(error)
    allowed = {name}.union(*(group for group in TOGETHER if name in group))
    return "C++" not in text and "frame #" not in text and any(re.search(rf"\b{re.escape(n)}\b", text) for n in allowed)


class Trial:
    """The valid call, and calls of it with one argument replaced."""

    def __init__(self, function: Callable[..., Any], arrays: dict[str, Any], options: dict[str, Any]) -> None:
        self.function, self.arrays, self.options = function, arrays, options
        self.wanted = self.run({})[0]

    def run(self, change: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        copies = {n: x.copy() if isinstance(x, np.ndarray) else x.clone() for n, x in self.arrays.items()}
        given = {**copies, **self.options, **change}
        try:
            result: Any = self.function(**given)
        except Exception as error:  # noqa: BLE001 - what it may be is the question
            result = error
        return result, {n: x for n, x in copies.items() if n in WRITTEN and n not in change}

    def fault(self, name: str, expectation: str, value: Any) -> str | None:
        """What is wrong with the outcome of passing `value` as `name`; None if nothing is."""
        result, written = self.run({name: value})
        if isinstance(result, ALLOWED):
            if not is_named(result, name):
                return f"does not name it: {type(result).__name__}: {result}"
            touched = [n for n, x in written.items() if not same(x, self.arrays[n])]
            return f"{touched} written beside {result}" if touched else None
        if expectation == "any" and (isinstance(result, MemoryError) or "DefaultCPUAllocator" in str(result)):
            return None  # a correct refusal of 64 TiB
        if isinstance(result, Exception):
            return f"{type(result).__name__}: {result!s:.300}"
        if expectation == "refuse":
            return f"accepted: {result!r:.60}"
        if expectation == "same" and not same(result, self.wanted):
            return "another result"
        return None


def same(x: Any, y: Any) -> bool:
    if isinstance(x, tuple):
        return all(map(same, x, y))
    if x is None or y is None:
        return x is y
    x, y = (np.asarray(z.detach() if torch is not None and isinstance(z, torch.Tensor) else z) for z in (x, y))
    return x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True)


NAMES = [*BASES, "slots", "schedule"]
IGNORED = {("paged", "cu_seqlens_k"), ("forward", "scheduler_metadata")}  # beside seqused_k; FlashAttention 4's own
ARGUMENTS = [(n, argument) for n in NAMES for argument in parameters(base(n)[0]) if (n, argument) not in IGNORED]


def faults(trial: Trial, name: str, values: Iterator[wrong_kinds.Value]) -> list[str]:
    found, is_given = [], name in trial.arrays
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for label, expectation, value in values:
            wanted = "any" if expectation == "same" and not is_given else expectation
            fault = trial.fault(name, wanted, value)
            if fault is not None:
                found.append(f"{name} = {label}: {fault}")
    return found


@pytest.mark.parametrize(("call", "name"), ARGUMENTS, ids=[f"{c}-{n}" for c, n in ARGUMENTS])
def test_numpy(call, name):
    function, arrays, options = base(call)
    kind = kind_of(function, name)
    trial = Trial(getattr(flashspark, function), arrays, options)
    assert not isinstance(trial.wanted, Exception), trial.wanted
    values = numbers_or(kind, wrong_kinds.arrays, template(kind, arrays, name), wrong_kinds.numbers)
    found = faults(trial, name, values)
    if kind == "result" and name in arrays:
        found += faults(trial, name, iter([("read-only", "refuse", wrong_kinds.frozen(arrays[name]))]))
    assert not found, "\n".join(found)


def numbers_or(
    kind: str, arrays: Callable[..., Any], x: Any, numbers: Callable[..., Any]
) -> Iterator[wrong_kinds.Value]:
    if kind in TENSORS:
        return arrays(x)
    return ((n, "any", v) for n, _, v in numbers()) if kind == "window" else numbers()  # window_size may be a pair


# torch_ops has four functions (test_doors.py); of similar calls to one function, one is enough here.
DOORS = {
    "torch": ("dense", "paged", "cache", "forward", "append", "slots", "schedule"),
    "operator": ("dense", "varlen", "cache varlen", "append"),
}
TORCH_ARGUMENTS = [(*c, door) for door, calls in DOORS.items() for c in ARGUMENTS if c[0] in calls]


@needs_torch
@pytest.mark.parametrize(("call", "name", "door"), TORCH_ARGUMENTS, ids=["-".join(c) for c in TORCH_ARGUMENTS])
def test_torch(call, name, door):
    function, arrays, options = base(call)
    home = flashspark
    if door == "operator":
        from flashspark import torch_ops as home
    kind = kind_of(function, name)
    given = {n: moved(x) for n, x in arrays.items()}
    trial = Trial(getattr(home, function), given, options)
    assert not isinstance(trial.wanted, Exception), trial.wanted
    # Values that are not tensors take the same path as in test_numpy, except in the operators' own code.
    all_numbers = door == "operator" and call in ("dense", "cache varlen", "append")
    numbers = wrong_kinds.all_numbers if all_numbers else wrong_kinds.torch_numbers
    values = numbers_or(kind, wrong_kinds.tensors, moved(template(kind, arrays, name)), numbers)
    found = faults(trial, name, values)
    if door == "operator" and call.startswith("cache"):  # documented: rows are written first
        found = [x for x in found if "written beside" not in x]
    assert not found, "\n".join(found)
