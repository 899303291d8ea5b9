"""append_kv with wild device metadata: rows without a valid position are skipped, nothing outside the cache changes,
and rows of sequences with valid metadata are written where they belong. check_device names the fault."""

from __future__ import annotations

import zlib
from typing import Any

import flashspark
import numpy as np
import pytest
import torch
from problem import LARGEST, ON_CPU, SMALLEST, wild
from test_wild_metadata import ROUNDS, border_is_whole, bordered, synchronize

COUNTS, HEADS, DIM, PAGE = [5, 1, 0, 7], 2, 64, 16
BEFORE = np.array([0, 30, 17, 40], np.int32)


def lists(kind: str) -> dict[str, np.ndarray]:
    """Valid arguments for each kind of call."""
    rng = np.random.default_rng(1)
    table = rng.permutation(24)[:16].reshape(4, 4).astype(np.int32)
    if kind == "slots":
        slots = rng.permutation(24 * PAGE)[: sum(COUNTS)].astype(np.int64)
        slots[3] = -1
        return {"slot_mapping": slots, "rotary_positions": rng.integers(0, 64, sum(COUNTS))}
    offsets = np.concatenate([[0], np.cumsum(COUNTS)]).astype(np.int32)
    found = {"cache_seqlens": BEFORE, "block_table": table, "cu_seqlens_k_new": offsets, "cu_seqlens_q": offsets}
    if kind == "paged":
        return {**found, "rotary_seqlens": BEFORE // 2, "seqused_q": np.array(COUNTS, np.int32)}
    del found["block_table"]
    return {
        **found,
        "cache_batch_idx": np.array([5, 0, 3, 2], np.int32),
        "cache_leftpad": np.array([0, 9, 0, 3], np.int32),
    }


KINDS = ("paged", "dense", "slots")
ARGUMENTS = [(kind, name) for kind in KINDS for name in lists(kind)]
IDS = [f"{kind}-{name}" for kind, name in ARGUMENTS]
TYPES = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float8_e4m3fn)]


class Append:
    """New rows and a cache with borders around them."""

    def __init__(self, kind: str, types: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
        torch.manual_seed(2)
        rows = sum(COUNTS)
        self.device, self.lists = device, lists(kind)
        self.k, self.v, self.q = (torch.randn(rows, h, DIM, device=device).to(types[0]) for h in (HEADS, HEADS, 4))
        shape = (6, 64, HEADS, DIM) if kind == "dense" else (24, PAGE, HEADS, DIM)
        like = torch.zeros(shape, dtype=torch.float32, device=device).to(types[1])
        self.pairs = [bordered(like), bordered(like), bordered(self.q)]
        self.turn = {name: torch.randn(64, 16, device=device) for name in ("rotary_cos", "rotary_sin")}

    def run(self, changes: dict[str, np.ndarray], **options: Any) -> list[torch.Tensor]:
        """The caches and q after the call."""
        given = {n: torch.from_numpy(x).to(self.device) for n, x in {**self.lists, **changes}.items()}
        caches = [x for _, x in self.pairs]
        for cache in caches[:2]:
            cache.copy_(torch.zeros_like(cache, dtype=torch.float32).to(cache.dtype))
        caches[2].copy_(self.q)
        flashspark.append_kv(self.k, self.v, *caches[:2], q=caches[2], **self.turn, **given, **options)
        synchronize()
        assert all(border_is_whole(buffer) for buffer, _ in self.pairs), "written outside the cache or q"
        return [x.float().clone() for x in caches]


def offsets_or_wild(rng: np.random.Generator, name: str, values: np.ndarray) -> np.ndarray:
    if name.startswith("cu_") and rng.random() < 0.5:
        return rng.permutation(values)
    return wild(rng, values, slice(None))


@pytest.mark.needs_gpu
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize(("kind", "name"), ARGUMENTS, ids=IDS)
def test_nothing_outside(kind, name, types, device):
    append = Append(kind, types, device)
    for turn in range(4 * ROUNDS):
        rng = np.random.default_rng([zlib.crc32(name.encode()), turn])
        append.run({name: offsets_or_wild(rng, name, append.lists[name])})
        append.run({n: offsets_or_wild(rng, n, x) for n, x in append.lists.items() if rng.random() < 0.6})


@pytest.mark.needs_gpu
@pytest.mark.parametrize("name", ["cache_seqlens", "block_table"])
@pytest.mark.parametrize("value", [SMALLEST, -1, LARGEST, 64, 24])
def test_the_other_rows_are_right(name, value, device):
    """The last sequence's entry is wild: its rows are skipped or stay in its own pages; the others' are in place."""
    append = Append("paged", TYPES[0], device)
    want = append.run({})
    values = append.lists[name].copy()
    values[3] = value
    got = append.run({name: values})
    own = append.lists["block_table"][3]
    others = [p for p in range(24) if p not in own]
    for x, y in zip(got[:2], want[:2]):
        torch.testing.assert_close(x[others], y[others], rtol=0, atol=0)
    torch.testing.assert_close(got[2][:6], want[2][:6], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_check_device_lets_right_calls_pass(kind, device):
    append = Append(kind, TYPES[0], device)
    for x, y in zip(append.run({}, check_device=True), append.run({})):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "name"), ARGUMENTS, ids=IDS)
def test_check_device_names_it(kind, name, device):
    if name == "cache_leftpad":
        return  # does not affect what is appended
    append = Append(kind, TYPES[0], device)
    for value in (LARGEST, SMALLEST):
        if name == "slot_mapping" and value < 0:
            continue  # skipped, by contract
        values = append.lists[name].copy()
        row = 1 if values.ndim == 1 else (1, 1)  # the page that holds key 30
        values[row] = value
        with pytest.raises(ValueError, match=name):
            append.run({name: values}, check_device=True)
        caches = [x for _, x in append.pairs[:2]]
        assert not any(x.float().any() for x in caches), "written, and refused"


def test_on_cpu_the_same_calls_are_refused_anyway(device):
    if ON_CPU:
        with pytest.raises(ValueError, match="cache_seqlens"):
            Append("paged", TYPES[0], device).run({"cache_seqlens": np.array([0, 70, 0, 0], np.int32)})
