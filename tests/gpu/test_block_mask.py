"""create_block_mask on the GPU: the CPU's lists, without waiting for the device, and how long a long mask takes."""

from __future__ import annotations

import flashspark
import numpy as np
import pytest
import torch
from flashspark.mods import scalar

pytestmark = pytest.mark.needs_gpu
FIELDS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
Q_FIELDS = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
LONGEST = 700


def mask_functions(device):
    """What masks are made of: arithmetic on positions, sequences and heads, tables of every type, numbers."""
    make = torch.Generator().manual_seed(7)
    documents = torch.sort(torch.randint(0, 6, (2, LONGEST), generator=make))[0].to(device)
    table = (torch.rand(LONGEST, LONGEST, generator=make) < 0.99).to(device)
    weights = torch.randn(3, LONGEST, generator=make)
    weights = {dtype: weights.to(dtype).to(device) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    small = torch.tensor([100, 333], dtype=torch.int16, device=device)
    on_host = torch.arange(LONGEST, dtype=torch.int32) // 150
    in_numpy = (np.arange(LONGEST) // 90).astype(np.int64)
    limit = scalar(77)
    causal = lambda b, h, q, k: q >= k  # noqa: E731
    document = lambda b, h, q, k: documents[b, q] == documents[b, k]  # noqa: E731
    window = lambda b, h, q, k: q - k < limit  # noqa: E731
    return {
        "causal": causal,
        "window": flashspark.and_masks(causal, window),
        "documents": document,
        "causal documents": flashspark.and_masks(causal, document),
        "documents or window": flashspark.or_masks(document, window),
        "two sides": lambda b, h, q, k: abs(q - k) < 50,
        "prefix": lambda b, h, q, k: (k < small[b]) | (q >= k),
        "heads": lambda b, h, q, k: (q - k) * (h + 1) < 200,
        "dilated": lambda b, h, q, k: (q - k) % 3 == 0,
        "tiles": lambda b, h, q, k: q // 48 == k // 48,
        "picture": lambda b, h, q, k: (abs(q // 20 - k // 20) <= 2) & (abs(q % 20 - k % 20) <= 3),
        "table": lambda b, h, q, k: table[q, k],
        "bfloat16": lambda b, h, q, k: weights[torch.bfloat16][h, k] > -2.5,
        "float16": lambda b, h, q, k: weights[torch.float16][h, q] > weights[torch.float16][h, k] - 4,
        "float32": lambda b, h, q, k: weights[torch.float32][h, q] * weights[torch.float32][h, k] < 5,
        "on the host": lambda b, h, q, k: on_host[q] >= on_host[k],
        "in numpy": lambda b, h, q, k: in_numpy[q] == in_numpy[k],
        "outside": lambda b, h, q, k: documents[b, q] == documents[b, k + 600],
        "rows": lambda b, h, q, k: q % 5 != 0,
        "keys": lambda b, h, q, k: k >= 128,
        "nothing": lambda b, h, q, k: q < 0,
        "everything": lambda b, h, q, k: q >= 0,
    }


SHAPES = [
    ((1, 1, 256, 256), 128),
    ((2, 3, 300, 655), 128),
    ((2, 3, 129, 64), (64, 32)),
    ((2, 2, 1, 700), (128, 16)),
    ((1, 3, 500, 500), (17, 50)),
    ((2, 1, 333, 700), (1000, 700)),
]


@pytest.mark.parametrize("name", mask_functions("cpu"))
def test_lists_are_the_cpus(name):
    on_gpu, on_cpu = mask_functions("cuda")[name], mask_functions("cpu")[name]
    for shape, size in SHAPES:
        for separate in (True, False):
            more = {"BLOCK_SIZE": size, "separate_full_blocks": separate}
            got = flashspark.create_block_mask(on_gpu, *shape, device="cuda", **more)
            want = flashspark.create_block_mask(on_cpu, *shape, device="cpu", **more)
            for field in (*FIELDS, *Q_FIELDS):
                a, b = getattr(got, field), getattr(want, field)
                assert (a is None) == (b is None)
                if a is not None:
                    assert a.is_cuda and a.dtype == torch.int32
                    assert torch.equal(a.cpu(), b), (name, shape, size, separate, field)


def timed(function, *args, **kwargs):
    """(result, milliseconds on the stream) of the second call; the first compiles."""
    for _ in range(2):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        result = function(*args, **kwargs)
        events[1].record()
        torch.cuda.synchronize()
    return result, events[0].elapsed_time(events[1])


@pytest.mark.parametrize("name", ["causal", "documents", "window"])
def test_131072_by_131072(name):
    length = 131072
    documents = torch.arange(length, device="cuda", dtype=torch.int32) // 5000
    masks = {
        "causal": lambda b, h, q, k: q >= k,
        "documents": lambda b, h, q, k: documents[q] == documents[k],
        "window": lambda b, h, q, k: (q >= k) & (q - k < 4096),
    }
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask, milliseconds = timed(flashspark.create_block_mask, masks[name], None, None, length, length, device="cuda")
    memory = torch.cuda.max_memory_allocated() - before
    print(f"{name}: {milliseconds:.2f} ms with the lists by keys, {memory / 2**20:.0f} MiB at most")
    assert milliseconds < 100
    assert memory < 256 << 20
    if name == "causal":
        rows = torch.arange(1024, dtype=torch.int32, device="cuda")
        assert (mask.kv_num_blocks == 1).all() and torch.equal(mask.kv_indices[0, 0, :, 0], rows)
        assert torch.equal(mask.full_kv_num_blocks[0, 0], rows)


def test_a_graph_sees_new_contents():
    documents = torch.zeros(1000, dtype=torch.int32, device="cuda")
    mask_mod = lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k)  # noqa: E731
    make = lambda: flashspark.create_block_mask(mask_mod, None, None, 1000, 1000, device="cuda")  # noqa: E731
    make()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = make()
    for step in (90, 300, 1000):
        documents.copy_(torch.arange(1000, device="cuda") // step)
        graph.replay()
        again = make()
        for field in (*FIELDS, *Q_FIELDS):
            assert torch.equal(getattr(mask, field), getattr(again, field)), (step, field)


def test_the_host_does_not_wait():
    documents = torch.arange(1000, device="cuda") // 100
    make = lambda: flashspark.create_block_mask(  # noqa: E731
        lambda b, h, q, k: documents[q] == documents[k], None, None, 1000, 1000, device="cuda"
    )
    make()
    torch.cuda.set_sync_debug_mode("error")
    try:
        make()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_another_stream():
    side = torch.cuda.Stream()
    numbers = torch.zeros(4096, dtype=torch.int32, device="cuda")
    mask_mod = lambda b, h, q, k: numbers[q] == numbers[k]  # noqa: E731
    flashspark.create_block_mask(mask_mod, None, None, 4096, 4096, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        numbers.copy_(torch.arange(4096, device="cuda") // 128)
        mask = flashspark.create_block_mask(mask_mod, None, None, 4096, 4096, device="cuda")
    torch.cuda.current_stream().wait_stream(side)
    assert (mask.full_kv_num_blocks == 1).all() and (mask.kv_num_blocks == 0).all()
