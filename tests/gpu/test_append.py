"""append_kv and flash_attn_with_kvcache(k, v) on the GPU, compared with the CPU on the same values."""

from __future__ import annotations

import flashspark
import pytest
import torch
from problem import captured, guarded

E4M3 = torch.float8_e4m3fn


def cache(kind: str, pages: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "packed":
        rows = guarded((pages, 16, heads, 2 * dim), torch.bfloat16, torch.device("cpu")).normal_().to(dtype)
        return rows[..., :dim], rows[..., dim:]
    shape = (pages, heads, 16, dim) if kind == "heads_first" else (pages, 16, heads, dim)
    k, v = (torch.randn(shape, dtype=torch.bfloat16).to(dtype) for _ in range(2))
    return (k.transpose(1, 2), v.transpose(1, 2)) if kind == "heads_first" else (k, v)


def on_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy with the same strides."""
    base = x if x._base is None else x._base
    return base.to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.needs_gpu
@pytest.mark.parametrize("rotary", [0, 32, 64], ids=lambda r: f"rotary {r}")
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("kind", ["separate", "packed", "heads_first"])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
                                   (torch.bfloat16, E4M3), (torch.float32, E4M3)], ids=str)  # fmt: skip
def test_append(types, kind, varlen, rotary, device):
    new_type, cache_type = types
    torch.manual_seed(3)
    heads, dim, counts = 3, 64, [5, 1, 0, 7]
    if not varlen:
        counts = [5] * 4
    table = torch.randperm(16).int().view(4, 4)
    before = torch.tensor([0, 30, 17, 40], dtype=torch.int32)
    shape = (sum(counts),) if varlen else (4, 5)
    k, v = (torch.randn(*shape, heads, dim).to(new_type) for _ in range(2))
    q = torch.randn(*shape, 2 * heads, dim, dtype=torch.bfloat16) if rotary else None
    k_cache, v_cache = cache(kind, 16, heads, dim, cache_type)
    options = {"rotary_interleaved": rotary == 32}
    lists = {"cache_seqlens": before, "block_table": table}
    if varlen:
        lists["cu_seqlens_k_new"] = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    if rotary:
        lists |= {name: torch.randn(64, rotary // 2) for name in ("rotary_cos", "rotary_sin")}
    if cache_type is E4M3:
        lists |= {"k_descale": torch.rand(4, heads) + 0.5, "v_descale": torch.rand(1, 1).expand(4, heads) + 0.5}
    ours = [None if x is None else on_device(x, device) for x in (k, v, k_cache, v_cache, q)]
    flashspark.append_kv(k, v, k_cache, v_cache, q=q, **lists, **options)
    moved = {name: x.to(device) for name, x in lists.items()}
    flashspark.append_kv(*ours[:4], q=ours[4], **moved, **options)
    for name, got, want in zip(("k", "v", "q"), (*ours[2:4], ours[4]), (k_cache, v_cache, q)):
        if want is None:
            continue
        pair = got.cpu().float(), want.float()
        if rotary and name != "v":  # the sum of two products may round differently by one unit in the last place
            step = 0.13 if cache_type is E4M3 and name == "k" else 0.008
            torch.testing.assert_close(*pair, rtol=step, atol=1e-5, equal_nan=True)
        else:
            torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["separate", "packed", "heads_first"])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
                                   (torch.bfloat16, E4M3), (torch.float32, E4M3), (E4M3, E4M3)], ids=str)  # fmt: skip
def test_slot_mapping(types, kind, device):
    """Compared with torch's indexing, and with itself in a captured graph whose slots change between replays."""
    new_type, cache_type = types
    torch.manual_seed(5)
    heads, dim, tokens = 3, 64, 37
    k, v = (torch.randn(tokens + 4, heads, dim, device=device).to(new_type) for _ in range(2))
    pair = [on_device(x, device) for x in cache(kind, 9, heads, dim, cache_type)]
    slots = torch.empty(tokens, dtype=torch.int64, device=device)
    scale = torch.tensor(0.5, device=device)
    factors = {"k_descale": scale, "v_descale": scale} if cache_type is E4M3 else {}

    def call() -> None:
        flashspark.append_kv(k, v, *pair, slot_mapping=slots, **factors)

    slots.fill_(-1)
    call()
    replay = captured(call)
    for round_ in range(3):
        slots.copy_(torch.randperm(9 * 16)[:tokens])
        slots[round_::5] = -1
        kept = slots >= 0
        at = slots[kept] // 16, slots[kept] % 16
        want = [x.float() for x in pair]
        for x, rows in zip(want, (k, v)):
            numbers = rows[:tokens][kept].float()
            x[at] = (numbers / scale if factors and new_type is not E4M3 else numbers).to(cache_type).float()
        replay()
        for got, x in zip(pair, want):
            torch.testing.assert_close(got.float(), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
                                   (torch.bfloat16, E4M3), (torch.float32, E4M3)], ids=str)  # fmt: skip
def test_slot_mapping_with_rotary(types, interleaved, device):
    """Compared with the CPU, in a captured graph whose slots and positions change. q is rotated even without a slot."""
    new_type, cache_type = types
    torch.manual_seed(6)
    heads, dim, tokens = 3, 64, 37
    rows = [torch.randn(tokens + 4, h, dim).to(new_type) for h in (heads, heads, 2 * heads)]
    cos, sin = torch.randn(50, 48, dtype=torch.bfloat16).chunk(2, -1)
    pair = cache("separate", 9, heads, dim, cache_type)
    k, v, q = (x.to(device) for x in rows)
    on_gpu = [on_device(x, device) for x in pair]
    slots, positions = (torch.zeros(n, dtype=torch.int64, device=device) for n in (tokens, tokens + 4))
    options = {"rotary_interleaved": interleaved}
    turn = [on_device(x, device) for x in (cos, sin)]

    def call() -> None:
        flashspark.append_kv(
            k, v, *on_gpu, q=q, rotary_cos=turn[0], rotary_sin=turn[1], slot_mapping=slots, rotary_positions=positions,
            **options,
        )  # fmt: skip

    if device.type == "cuda":  # the CPU rejects invalid positions
        slots.fill_(-1)
        positions.fill_(-1)
        call()
        torch.testing.assert_close(q.cpu(), rows[2], rtol=0, atol=0)
    replay = captured(call)
    for round_ in range(3):
        slots.copy_(torch.randperm(9 * 16)[:tokens])
        slots[round_::5] = -1
        positions.copy_(torch.randint(0, 50, (tokens + 4,)))
        q.copy_(rows[2])
        want = rows[2].clone()
        flashspark.append_kv(
            *rows[:2], *pair, q=want, rotary_cos=cos, rotary_sin=sin, slot_mapping=slots.cpu(),
            rotary_positions=positions.cpu(), **options,
        )  # fmt: skip
        replay()
        for name, got, x in zip("kvq", (*on_gpu, q), (*pair, want)):
            # One unit in the last place of the dtype; for e4m3 below 2^-6 that is 2^-9.
            step, least = (0, 0) if name == "v" else (0.13, 0.002) if x.dtype is E4M3 else (0.008, 1e-5)
            torch.testing.assert_close(got.cpu().float(), x.float(), rtol=step, atol=least, equal_nan=True)


@pytest.mark.needs_gpu
def test_attention_with_new_keys(device):
    """flash_attn_with_kvcache writes k and v and attends to them, in a captured graph as well."""
    torch.manual_seed(4)
    table = torch.randperm(12, device=device).int().view(3, 4)
    k_cache, v_cache = (torch.randn(12, 16, 2, 64, device=device).bfloat16() for _ in range(2))
    q, k, v = (torch.randn(3, 1, h, 64, device=device).bfloat16() for h in (4, 2, 2))
    used = torch.tensor([5, 40, 17], dtype=torch.int32, device=device)
    host = [x.cpu() for x in (q, k_cache, v_cache, k, v, used, table)]
    want = flashspark.flash_attn_with_kvcache(*host[:5], cache_seqlens=host[5], block_table=host[6], causal=True)
    out = torch.empty_like(q)

    def call() -> None:
        flashspark.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=used, block_table=table, causal=True, out=out
        )

    call()
    replay = captured(call)
    out.fill_(float("nan"))
    replay()
    torch.testing.assert_close(out.cpu().float(), want.float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(k_cache.cpu(), host[1], rtol=0, atol=0)


@pytest.mark.needs_gpu
def test_rows_without_a_place(device):
    """Lengths and pages of padding rows are stale: nothing is written for them."""
    k_cache, v_cache = (torch.zeros(4, 16, 1, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    k = torch.ones(3, 2, 1, 64, device=device, dtype=torch.bfloat16)
    used = torch.tensor([1 << 28, 3, -5], dtype=torch.int32, device=device)
    table = torch.tensor([[0, 1], [-1, 9], [2, 3]], dtype=torch.int32, device=device)
    flashspark.append_kv(k, k, k_cache, v_cache, used, block_table=table)
    torch.cuda.synchronize()
    assert not k_cache.any()
    assert not v_cache.any()
