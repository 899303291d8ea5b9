"""What a serving engine does: CUDA graphs replayed with other lengths, streams, threads, repeated runs, huge
tensors."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import failures, poison_unseen
from problem import GUARD, ON_CPU, POISON_INT, Problem, Spec, arena, build, captured, guarded, offsets

RUNS = 5 if ON_CPU else 50
LENGTH_SETS = 10 if ON_CPU else 100


@contextmanager
def no_waiting():
    """Fails on anything that makes the host wait for the device."""
    if ON_CPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronize() -> None:
    if not ON_CPU:
        torch.cuda.synchronize()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.view(integer), b.view(integer))


class Engine:
    """The buffers of a captured step: rows, lengths and pages change in place between replays."""

    def __init__(self, spec: Spec, slots: int, rows: int, longest_k: int, device: torch.device, seed: int):
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.slots, self.rows, self.longest_k, self.longest_q = slots, rows, longest_k, max(spec.q_lens)
        self.width = -(-longest_k // spec.page_size)
        self.pages = slots * self.width // 2 + self.width
        spec = replace(spec, q_lens=[0] * slots, k_lens=[0] * slots)
        q = guarded((rows, spec.heads[0], spec.dims[0]), spec.dtype, device)
        pools = [guarded((self.pages, spec.page_size, spec.heads[1], d), spec.dtype, device) for d in spec.dims]
        self.fresh = [torch.randn(x.shape, device=device).to(spec.dtype) for x in (q, *pools)]
        host = {
            "cu_seqlens_q": np.zeros(slots + 1, np.int32),
            "seqused_k": np.zeros(slots, np.int32),
            "page_table": np.zeros((slots, self.width), np.int32),
        }
        self.problem = Problem(spec, q, *pools, host, arena(host, device))
        self.problem.max_seqlen_q, self.problem.max_seqlen_k = self.longest_q, longest_k
        options = self.problem.options
        if spec.sinks is not None:
            options["sinks"] = torch.randn(spec.heads[0], device=device).to(spec.sinks)
        if spec.alibi:
            options["alibi_slopes"] = torch.rand(spec.heads[0], device=device) * 0.3
        self.results = self.problem.empty_results()
        self.problem.reschedule()

    def next_step(self) -> None:
        """Sets other lengths and pages. Idle slots, in between or at the end, keep what an earlier step left there."""
        rng, host = self.rng, self.problem.host
        active = rng.random(self.slots) < rng.choice([0.0, 0.3, 0.8, 1.0], p=[0.03, 0.27, 0.3, 0.4])
        if rng.random() < 0.5:
            active = np.sort(active)[::-1]  # padding at the end, as engines have it
        q_lens = np.where(active, rng.integers(1, self.longest_q + 1, self.slots), 0)
        q_lens = np.where(np.cumsum(q_lens) <= self.rows, q_lens, 0)
        room = self.pages
        for b in range(self.slots):
            if q_lens[b] == 0:
                if rng.random() < 0.3:
                    host["seqused_k"][b], host["page_table"][b] = POISON_INT, POISON_INT
                continue
            top = min(self.longest_k, (room - (self.slots - b)) * self.problem.spec.page_size)
            host["seqused_k"][b] = rng.integers(max(0, int(q_lens[b]) - 3), max(top, int(q_lens[b])) + 1)
            room -= -(-int(host["seqused_k"][b]) // self.problem.spec.page_size)
        order, used = rng.permutation(self.pages), 0
        for b in np.flatnonzero(q_lens):
            count = -(-int(host["seqused_k"][b]) // self.problem.spec.page_size)
            host["page_table"][b, :count] = np.take(order, range(used, used + count), mode="wrap")
            used += count
        host["cu_seqlens_q"][:] = offsets(q_lens)
        for name, values in host.items():
            self.problem.device[name].copy_(torch.from_numpy(values))
        if rng.random() < 0.7:  # otherwise the metadata is an earlier step's
            self.problem.reschedule()
        for x, y in zip((self.problem.q, self.problem.k, self.problem.v), self.fresh):
            x.copy_(y)
        self.problem.q[int(q_lens.sum()) :] = float("nan")
        poison_unseen(self.problem)
        for x in self.results:
            if x is not None:
                x.fill_(float("nan"))

    def step(self) -> None:
        with no_waiting():
            self.problem.run(*self.results)


ENGINES: dict[str, tuple[dict, int, int, int]] = {  # Spec, slots, rows, longest_k
    "decode": ({"q_lens": [1], "dims": (128, 128), "heads": (8, 1)}, 48, 48, 900),
    "decode, few": ({"q_lens": [1], "dims": (128, 128), "heads": (16, 2)}, 3, 3, 4000),
    "decode, metadata": ({"q_lens": [1], "dims": (128, 128), "heads": (8, 1), "schedule": "fresh"}, 48, 48, 900),
    "verify, metadata": ({"q_lens": [8], "dims": (64, 64), "heads": (6, 2), "schedule": "fresh"}, 20, 160, 1600),
    "verify": ({"q_lens": [8], "dims": (64, 64), "heads": (6, 2)}, 20, 160, 600),
    "verify, 5 splits": ({"q_lens": [6], "dims": (256, 256), "num_splits": 5}, 6, 36, 1500),
    "mixed": ({"q_lens": [300], "dims": (128, 128), "heads": (4, 2)}, 12, 700, 800),
    "mixed, rows for no one": ({"q_lens": [40], "dims": (96, 96), "num_splits": 2, "lse": False}, 30, 200, 300),
    "window and sinks": ({"q_lens": [50], "window": (100, 0), "sinks": torch.float32}, 10, 300, 700),
    "softcap and alibi": ({"q_lens": [20], "softcap": 20.0, "alibi": 1, "dims": (192, 128)}, 10, 150, 500),
    "fp16, pages of 784": ({"q_lens": [9], "dtype": torch.float16, "page_size": 784}, 8, 60, 1600),
    "head_dim 512": ({"q_lens": [3], "dims": (512, 512), "heads": (8, 1)}, 8, 24, 500),
}


@pytest.mark.parametrize("name", ENGINES)
def test_replay_at_other_lengths(name, device):
    options, slots, rows, longest_k = ENGINES[name]
    engine = Engine(Spec(k_lens=[0], **options), slots, rows, longest_k, device, seed=len(name))
    beside = build(Spec([2, 1], [500, 90], (4, 2), engine.problem.spec.dims, num_splits=3), 5, device)
    engine.next_step()
    engine.step()  # loads the kernels, which a capture must not do
    replay = captured(engine.step)
    for number in range(LENGTH_SETS):
        engine.next_step()
        if number % 10 == 0:
            beside.run()  # an eager call in between must not disturb the graph's buffers
        replay()
        found = failures(engine.problem, *engine.results)
        assert not found, f"length set {number}: {found}\n{engine.problem.host}"


REPEATED = {
    "decode": Spec([1] * 5, [3000, 100, 1, 777, 2048], (8, 1), (128, 128)),
    "decode, forced splits": Spec([1] * 3, [3000, 100, 1500], (16, 2), (64, 64), num_splits=9),
    "mixed": Spec([1, 700, 3, 64], [900, 700, 1300, 100], (8, 2), (128, 128)),
    "prefill": Spec([1500, 40], [1500, 2000], (16, 4), (64, 64)),
    "window": Spec([300, 5], [1000, 900], (4, 1), (256, 256), window=(200, 0)),
    "changed": Spec([300, 5], [1000, 900], (4, 1), (192, 128), softcap=30.0, alibi=1, prefix="per_seq"),
}


@pytest.mark.parametrize("name", REPEATED)
def test_bits_repeat(name, device):
    problem = build(REPEATED[name], 3, device)
    poison_unseen(problem)
    first = problem.run()
    assert not failures(problem, *first)
    for _ in range(RUNS):
        again = problem.run()
        assert same_bits(first[0], again[0]) and same_bits(first[1], again[1])


def test_a_sequence_does_not_depend_on_its_neighbours(device):
    """deterministic=True: the same bits alone and in a batch, even where other kernels would suit them better."""
    spec = Spec([3, 3000, 1, 1], [900, 3500, 1200, 7], (8, 2), (128, 128), deterministic=True)
    problem = build(spec, 4, device)
    poison_unseen(problem)
    out, _ = problem.run()
    cu, used = problem.device["cu_seqlens_q"], problem.device["seqused_k"]
    for b in range(4):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        alone = Problem(
            replace(spec, q_lens=[spec.q_lens[b]], lse=False), problem.q[rows], problem.k, problem.v, {}, {}
        )
        alone.options, alone.max_seqlen_q, alone.max_seqlen_k = problem.options, spec.q_lens[b], spec.k_lens[b]
        alone.device = {
            "cu_seqlens_q": offsets_tensor([spec.q_lens[b]], device),
            "seqused_k": used[b : b + 1],
            "page_table": problem.device["page_table"][b : b + 1],
        }
        assert same_bits(alone.run()[0], out[rows])


@pytest.mark.skipif(ON_CPU, reason="the CPU engine cuts tiles by the rows that it is given")
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("features", [{}, {"softcap": 20.0}, {"fp8": "kv"}, {"window": (200, 0)}], ids=str)
def test_chunks_of_a_prompt_change_no_bit(features, dims, device):
    """deterministic=True: a row depends on its own query and keys only, not on the rows in the same tile."""
    spec = Spec([700], [700], (8, 2), dims, deterministic=True, **features)
    problem = build(spec, 4, device)
    poison_unseen(problem)
    problem.q *= torch.logspace(-1, 1, 700, device=device, dtype=torch.float32).to(problem.q.dtype)[:, None, None]
    whole, _ = problem.run()
    parts = []
    for begin, end in ((0, 1), (1, 38), (38, 333), (333, 699), (699, 700)):
        length = end - begin
        part = Problem(replace(spec, q_lens=[length], lse=False), problem.q[begin:end], problem.k, problem.v, {}, {})
        part.options, part.max_seqlen_q, part.max_seqlen_k = problem.options, length, end
        part.device = problem.device | {
            "cu_seqlens_q": offsets_tensor([length], device),
            "seqused_k": torch.full_like(problem.device["seqused_k"], end),
        }
        parts.append(part.run()[0])
    assert same_bits(torch.cat(parts), whole)


def offsets_tensor(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(offsets(lengths)).to(device)


@pytest.mark.parametrize("layout", ["paged", "varlen", "dense", "dense_paged"])
def test_nothing_waits(layout, device):
    for num_splits in (0, 1, 4):
        spec = Spec([1, 5, 100], [900, 400, 100], (4, 2), (128, 128), layout=layout, num_splits=num_splits)
        problem = build(spec, 2, device)
        poison_unseen(problem)
        results = problem.empty_results()
        problem.run(*results)
        with no_waiting():
            problem.run(*results)
        assert not failures(problem, *results)


PAIR = [
    Spec([1] * 4, [3000, 2000, 100, 2500], (16, 2), (128, 128), num_splits=6),
    Spec([4] * 3, [1000, 2200, 1700], (8, 1), (128, 128), num_splits=4),
]


@pytest.mark.needs_gpu
def test_two_streams_at_once(device):
    """Calls on different streams have scratch memory of their own."""
    problems = [build(spec, i, device) for i, spec in enumerate(PAIR)]
    for problem in problems:
        poison_unseen(problem)
    expected = [p.run() for p in problems]
    for p, results in zip(problems, expected):
        assert not failures(p, *results)
    streams = [torch.cuda.Stream() for _ in problems]
    results = [[p.empty_results() for _ in range(RUNS)] for p in problems]
    synchronize()
    for i in range(RUNS):
        for p, stream, outs in zip(problems, streams, results):
            with torch.cuda.stream(stream):
                p.run(*outs[i])
    synchronize()
    for outs, (out, lse) in zip(results, expected):
        assert all(same_bits(o, out) and same_bits(s, lse) for o, s in outs)


def test_threads(device):
    """Eight threads call at once, each on its own stream."""
    specs = [replace(PAIR[i % 2], heads=(4 + i, 1), dims=((64, 64), (128, 128))[i // 4]) for i in range(8)]
    problems = [build(spec, i, device) for i, spec in enumerate(specs)]
    for problem in problems:
        poison_unseen(problem)
    expected = [p.run() for p in problems]
    synchronize()
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            stream = None if ON_CPU else torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(RUNS):
                    out, lse = problems[number].run()
                    if stream is not None:
                        stream.synchronize()
                    if not (same_bits(out, expected[number][0]) and same_bits(lse, expected[number][1])):
                        wrong.append(f"thread {number}: other bits")
        except Exception as error:  # noqa: BLE001 - report any error of the thread
            wrong.append(f"thread {number}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]


@pytest.mark.needs_gpu
def test_runs_on_the_current_stream(device):
    """Work queued before the call on the same stream is seen, even if it ends long after the call returns."""
    problem = build(Spec([1, 40], [300, 500], (4, 2), (128, 128)), 8, device)
    poison_unseen(problem)
    wanted = problem.run()
    q = problem.q.clone()
    problem.q.fill_(float("nan"))
    results = problem.empty_results()
    stream = torch.cuda.Stream()
    synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        problem.q.copy_(q)
        problem.run(*results)
    assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    assert same_bits(results[0], wanted[0]) and same_bits(results[1], wanted[1])


@pytest.mark.needs_gpu
@pytest.mark.parametrize("cache", ["separate", "packed", "heads_first"])
def test_page_pool_beyond_2_31_elements(cache, device):
    """The pages in use lie at both ends of a cache of more than 2^31 elements."""
    spec = Spec([1, 70, 3], [500, 300, 90], (16, 8), (128, 128), cache=cache)
    problem = build(spec, 6, device)
    poison_unseen(problem)
    small, pages = (problem.k, problem.v), len(problem.k)
    count = (1 << 31) // problem.k[0].numel() + 1000
    strides = tuple(problem.k.stride())
    storage = torch.full((count * strides[0] + GUARD,), float("nan"), dtype=spec.dtype, device=device)
    apart = 128 if cache == "packed" else 0
    big_k = storage.as_strided((count, *problem.k.shape[1:]), strides)
    if apart:
        big_v = storage.as_strided(big_k.shape, strides, apart)
    else:
        big_v = torch.full_like(storage, float("nan")).as_strided(big_k.shape, strides)
    places = np.concatenate([np.arange(pages // 2), count - pages + np.arange(pages // 2, pages)])
    at = torch.from_numpy(places).to(device)
    for big, x in zip((big_k, big_v), small):
        big[at] = x
    table = problem.host["page_table"]
    known = (table >= 0) & (table < pages)
    problem.host["page_table"] = np.where(known, places[np.clip(table, 0, pages - 1)], table).astype(np.int32)
    problem.k, problem.v, problem.device = big_k, big_v, arena(problem.host, device)
    assert big_k.stride(0) * (count - 1) > 1 << 31
    out, lse = problem.run()
    assert not failures(problem, out, lse)


@pytest.mark.needs_gpu
def test_rows_beyond_2_31_elements(device):
    """The rows in use are the last ones of q, out and lse of more than 2^31 elements."""
    spec = Spec([1, 90], [200, 300], (64, 8), (128, 128))
    problem = build(spec, 6, device)
    poison_unseen(problem)
    out, lse = problem.run()
    assert not failures(problem, out, lse)
    rows = (1 << 31) // (64 * 128) + 500
    first = rows - 91
    q = torch.full((rows, 64, 128), float("nan"), dtype=spec.dtype, device=device)
    q[first:] = problem.q
    problem.q = q
    problem.host["cu_seqlens_q"] = problem.host["cu_seqlens_q"] + np.int32(first)
    problem.device = arena(problem.host, device)
    far_out, far_lse = problem.run()
    # The grid depends on total_q, so the two runs may sum in a different order.
    torch.testing.assert_close(far_out[first:], out, rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(far_lse[:, first:].contiguous(), lse, rtol=1e-5, atol=1e-5)
    assert far_out[:first].isnan().all() and far_lse[:, :first].isnan().all()


@pytest.mark.needs_gpu
def test_fork_says_so():
    """A process forked after CUDA was used gets an error that names the reason; it neither hangs nor crashes."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fork_child.py"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "fork" in run.stdout, run.stdout + run.stderr
