"""Out-of-range device metadata never makes a kernel access memory outside its tensors. Sequences with valid metadata of
their own get correct results where the layout keeps sequences apart. check_device names the fault.

FLASHSPARK_WILD_CASES: rounds of random values for each problem and argument (3).
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import flashspark
import numpy as np
import pytest
import torch
from oracle import failures, poison_unseen
from problem import LARGEST, ON_CPU, SMALLEST, Problem, Spec, arena, build, wild

ROUNDS = int(os.environ.get("FLASHSPARK_WILD_CASES", "3"))
BORDER = 4096  # elements around a result or cache that no call may change

DECODE = {"q_lens": [1, 1, 0, 1, 1], "k_lens": [900, 30, 4, 1500, 77], "dims": (128, 128)}
MIXED = {"q_lens": [1, 7, 0, 130, 33], "k_lens": [300, 65, 20, 130, 700]}
WIDE = {"q_lens": [400, 65, 0, 300] * 8, "k_lens": [530, 65, 9, 300] * 8, "heads": (8, 4), "dims": (128, 128)}
PROBLEMS: dict[str, Spec] = {
    "prefill, wide": Spec(**WIDE),
    "prefill, wide, varlen": Spec(**WIDE, layout="varlen", seqused_k=True, seqused_q=True),
    "few": Spec(**MIXED, num_splits=1),
    "few, splits": Spec(**{**MIXED, "dims": (128, 128)}, num_splits=4),
    "few, varlen": Spec(**MIXED, layout="varlen", seqused_q=True),
    "few, dense": Spec(**MIXED, layout="dense", leftpad=True, batch_index=True, seqused_q=True, seqused_k=True),
    "few, dense q": Spec(**MIXED, layout="dense_paged", leftpad=True),
    "few, indexed pages of 20": Spec(**MIXED, batch_index=True, page_size=20, leftpad=True),
    "few, whole table": Spec(**MIXED, whole_table=True, page_size=48),
    "decode": Spec(**DECODE, heads=(16, 2), schedule="fresh"),
    "decode, D64, packed": Spec(**{**DECODE, "dims": (64, 64)}, heads=(4, 2), cache="packed", leftpad=True),
    "decode, splits": Spec(**DECODE, num_splits=5),
    "decode, fp8": Spec(**DECODE, fp8="kv", heads=(8, 1), schedule="fresh"),
    "decode, pages of 1": Spec(**{**DECODE, "dims": (64, 64)}, page_size=1),
    "verify, D256": Spec([4, 5, 8], [1200, 600, 90], (6, 1), (256, 256), schedule="fresh"),
    "D512": Spec([3, 40], [500, 90], (8, 1), (512, 512)),
    "changed": Spec(**MIXED, softcap=20.0, prefix="per_seq", causal_per_seq=True, window=(50, 0)),
    "changed, per token": Spec(**MIXED, prefix="per_token", causal_per_seq=True, layout="varlen"),
    "R-SWA": Spec(**MIXED, rswa=40),
    "chunks": Spec(**MIXED, chunk=60, causal_per_seq=True),
    "fp8": Spec(**{**MIXED, "dims": (128, 128)}, fp8="qkv", e4m3_out=True),
}
# Arguments of which one sequence's entry may be wrong while the others stay correct; likewise page_table, by rows.
OWN = ("seqused_q", "seqused_k", "leftpad_k", "kv_batch_index", "causal_per_seq", "rswa_prefix_lens", "prefix_ranges")


def offsets_at_random(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """cu_seqlens that decrease, are negative, or jump beyond the tensor."""
    kind = rng.integers(4)
    if kind == 0:
        return values[::-1].copy()
    if kind == 1:
        return (values.astype(np.int64) * 1000003).astype(np.int32)
    if kind == 2:
        return rng.permutation(values)
    return wild(rng, values, slice(None))


def bordered(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A view shaped like x and filled as by `empty_results`, inside a longer buffer of the same bytes."""
    byte = 0x7F if x.dtype == torch.float8_e4m3fn else 0xFF  # NaN in every dtype
    size = x.numel() * x.element_size()
    buffer = torch.full((size + 2 * BORDER,), byte, dtype=torch.uint8, device=x.device)
    return buffer, buffer[BORDER : BORDER + size].view(x.dtype).view(x.shape)


def border_is_whole(buffer: torch.Tensor) -> bool:
    byte = int(buffer[1])
    return byte in (0x7F, 0xFF) and bool((buffer[:BORDER] == byte).all() and (buffer[-BORDER:] == byte).all())


def test_borders_notice():
    for position in (0, BORDER - 1, -BORDER, -1):
        buffer, view = bordered(torch.zeros(3, 5, dtype=torch.bfloat16))
        view.fill_(1)
        assert border_is_whole(buffer)
        buffer[position] = 1
        assert not border_is_whole(buffer)


def synchronize() -> None:
    if not ON_CPU:
        torch.cuda.synchronize()


def call(problem: Problem, **changes: Any) -> list[torch.Tensor]:
    """Runs with results inside borders. On CPU tensors the call reports the fault and leaves the results unchanged."""
    pairs = [bordered(x) for x in problem.empty_results() if x is not None]
    out, lse = ([x for _, x in pairs] + [None])[:2]
    before = [x.clone() for x in (problem.k, problem.v)]
    try:
        problem.run(out, lse, **changes)
    except ValueError:
        if not ON_CPU:
            raise
        assert bool(out.float().isnan().all()), "written, and refused"
        return []
    synchronize()
    assert all(border_is_whole(buffer) for buffer, _ in pairs), "written outside the results"
    for x, y in zip((problem.k, problem.v), before):
        assert torch.equal(x.view(torch.int16), y.view(torch.int16)), "the keys or values have changed"
    return [x for _, x in pairs]


def right(name: str, device: torch.device) -> Problem:
    problem = build(PROBLEMS[name], zlib.crc32(name.encode()), device)
    poison_unseen(problem)
    return problem


def with_list(problem: Problem, name: str, values: np.ndarray) -> Problem:
    """The problem with one device list replaced. The host's copy stays valid for the oracle."""
    changed = replace(problem, device=arena({**problem.host, name: values}, problem.q.device))
    return changed


def arguments() -> Iterator[tuple[str, str]]:
    for name, spec in PROBLEMS.items():
        for argument in build(spec, zlib.crc32(name.encode()), "cpu").host:
            yield name, argument


ARGUMENTS = list(arguments())
IDS = [f"{name}-{argument}" for name, argument in ARGUMENTS]


def of(name: str, argument: str, turn: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(f"{name} {argument}".encode()), turn])


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=IDS)
def test_nothing_outside(name, argument, device):
    """All of a list may be wild: no fault, and nothing written outside the results."""
    problem = right(name, device)
    for turn in range(ROUNDS):
        rng, values = of(name, argument, turn), problem.host[argument]
        changed = offsets_at_random(rng, values) if argument.startswith("cu_") else wild(rng, values, slice(None))
        call(with_list(problem, argument, changed))


@pytest.mark.parametrize("name", PROBLEMS)
def test_everything_wild(name, device):
    """Several lists at once."""
    problem = right(name, device)
    for turn in range(2 * ROUNDS):
        rng = of(name, "all", turn)
        lists = {}
        for argument, values in problem.host.items():
            changed = offsets_at_random(rng, values) if argument.startswith("cu_") else wild(rng, values, slice(None))
            lists[argument] = changed if rng.random() < 0.6 else values
        call(replace(problem, device=arena(lists, problem.q.device)))


def left_right(problem: Problem, victim: int) -> torch.Tensor:
    """Rows of q that do not belong to the victim sequence."""
    first, count = problem.sequences()[:2]
    keep = torch.ones(problem.q.shape[:-2].numel(), dtype=torch.bool)
    dense = problem.q.shape[1] if problem.q.ndim == 4 else 0
    start = victim * dense if dense else int(first[victim])
    ends = problem.host.get("cu_seqlens_q")
    end = start + dense if dense else int(ends[victim + 1])
    keep[start : max(end, start + int(count[victim]))] = False
    return keep.to(problem.q.device)


APART = [(n, a) for n, a in ARGUMENTS if a in OWN or a == "page_table"]


@pytest.mark.needs_gpu
@pytest.mark.parametrize(("name", "argument"), APART, ids=[f"{n}-{a}" for n, a in APART])
def test_the_other_sequences_are_right(name, argument, device):
    """One sequence's entry is wild: every other row is unchanged, up to the order of summation."""
    problem = right(name, device)
    want = problem.run()
    assert not failures(problem, *want)
    spec = problem.spec
    victims = [b for b, n in enumerate(spec.q_lens) if n > 0]
    for turn in range(ROUNDS):
        rng = of(name, argument, turn)
        victim = victims[int(rng.integers(len(victims)))]
        row = victim
        if argument == "page_table" and "kv_batch_index" in problem.host:
            row = int(problem.host["kv_batch_index"][victim])
        keep = left_right(problem, victim)
        at: Any = (slice(row, row + 1),)
        if argument == "prefix_ranges" and spec.prefix == "per_token":
            at = (~keep).cpu().numpy()
        got = call(with_list(problem, argument, wild(rng, problem.host[argument], at)))
        rows = [x.reshape(-1, *x.shape[-2:])[keep].float() for x in (got[0], want[0])]
        step = 0.13 if spec.e4m3_out else 2**-6  # one unit in the last place of the dtype
        torch.testing.assert_close(*rows, rtol=step, atol=2**-6, equal_nan=True)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("name", [n for n, spec in PROBLEMS.items() if spec.schedule])
def test_wild_scheduler_metadata(name, device):
    """Scheduler metadata with a valid fingerprint but wild fields, and with everything wild, causes no access outside
    the tensors; valid metadata afterwards still gives correct results."""
    problem = right(name, device)
    made = problem.metadata
    assert made is not None
    assert made.numel() > 0 or "decode" not in name
    if made.numel() == 0:
        return  # the plan uses no scheduler metadata on this GPU
    kept = made.clone()
    for turn in range(20 * ROUNDS):
        rng = of(name, "schedule", turn)
        words = kept.cpu().numpy()
        at = rng.random(words.shape) < rng.choice([0.01, 0.1, 0.5, 1.0])
        changed = torch.from_numpy(np.where(at, wild(rng, words, slice(None)), words)).to(device)
        made.copy_(changed)
        got = call(problem)
        if turn % 4 == 3:
            made.copy_(kept.roll(int(rng.integers(1, len(kept)))))
            got = call(problem)
        assert len(got) >= 1
    made.copy_(kept)
    assert not failures(problem, *problem.run())


@pytest.mark.parametrize("name", PROBLEMS)
def test_check_device_lets_right_problems_pass(name, device):
    problem = right(name, device)
    out, lse = problem.run(check_device=True)
    assert not failures(problem, out, lse)


# Arguments that no check can reject: any value is legal, or the argument only selects keys.
LEGAL = {"prefix_ranges", "rswa_prefix_lens"}
WORDS = {"leftpad_k": "cache_leftpad", "kv_batch_index": "cache_batch_idx", "page_table": "block_table"}


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=IDS)
def test_check_device_names_it(name, argument, device):
    """A single out-of-range value, in a sequence that has rows."""
    if argument in LEGAL:
        return
    problem = right(name, device)
    victim = next(b for b, n in enumerate(problem.spec.q_lens) if n > 0 and (argument != "cu_seqlens_q" or b > 0))
    for value in (SMALLEST, LARGEST, -1):
        if argument == "leftpad_k" and value > 0:
            continue  # no keys are left
        values = problem.host[argument].copy()
        row = victim
        if argument == "page_table" and "kv_batch_index" in problem.host:
            row = int(problem.host["kv_batch_index"][victim])
        if argument == "page_table":  # the page of the last key
            first, count = problem.sequences()[2:4, victim]
            values[row, (first + count - 1) // problem.spec.page_size] = value
        else:
            values[row] = value
        changed = with_list(problem, argument, values)
        out, lse = changed.empty_results()
        words = "|".join(
            {argument, WORDS.get(argument, argument), "cache_seqlens" if argument == "seqused_k" else argument}
        )
        with pytest.raises(ValueError, match=rf"({words})"):
            changed.run(out, lse, check_device=True)
        assert bool(out.float().isnan().all())


CHILD = """
import flashspark, torch
x = torch.randn(3, 2, 64, device="{device}").bfloat16()
pages = torch.randn(4, 16, 2, 64, device="{device}").bfloat16()
cu = torch.tensor([0, 3], dtype=torch.int32, device="{device}")
used = torch.tensor([20], dtype=torch.int32, device="{device}")
table = torch.tensor([[1, 9]], dtype=torch.int32, device="{device}")
try:
    flashspark.flash_attn_varlen_func(x, pages, pages, cu, None, 3, 32, block_table=table, seqused_k=used)
except ValueError as error:
    print(error)
"""


def test_check_by_the_environment(device):
    """FLASHSPARK_CHECK=1 enables the check for every call."""
    environment = {**os.environ, "FLASHSPARK_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(device=device.type)], env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "block_table[0,1] = 9" in done.stdout


def test_a_capture_cannot_be_checked(device):
    if ON_CPU:
        return  # nothing is captured on the CPU
    problem = right("few", device)
    problem.run()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="check_device"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        problem.run(check_device=True)
    assert flashspark.native_version()
