"""Score functions, mask functions and block lists on the GPU, against the CPU engine on the same numbers in float32."""

from __future__ import annotations

import flashspark
import pytest
import torch

pytestmark = pytest.mark.needs_gpu
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of out, whose rows are means of standard normal values


def tensors(batch, heads, heads_kv, seqlen_q, seqlen_k, width, dtype, seed=0):
    make = torch.Generator("cuda").manual_seed(seed)
    shape = [(batch, heads, seqlen_q, width), (batch, heads_kv, seqlen_k, width), (batch, heads_kv, seqlen_k, width)]
    return [torch.randn(s, generator=make, device="cuda").to(dtype) for s in shape]


class Captured:
    """The tensors that the functions below read, on one device."""

    def __init__(self, device, tokens=700):
        make = torch.Generator().manual_seed(7)
        self.slopes = (torch.rand(8, generator=make) * 0.2).to(device)
        self.table = torch.randn(8, tokens, generator=make).to(torch.bfloat16).to(device)
        self.cube = torch.randn(2, 8, tokens, generator=make).half().to(device)
        self.documents = torch.sort(torch.randint(0, 6, (2, tokens), generator=make))[0].to(device)
        self.offsets = torch.randint(-3, 4, (tokens,), generator=make, dtype=torch.int32).to(device)
        self.scale = torch.tensor(1.25).to(device)


def score_functions(c):
    def alibi(score, b, h, q, kv):
        return score + c.slopes[h] * (kv - q)

    def capped(score, b, h, q, kv):
        return 15 * torch.tanh(score / 15)

    def relative(score, b, h, q, kv):
        return score - 0.01 * abs(q - kv)

    def by_key(score, b, h, q, kv):
        return torch.where(kv % 3 == 0, score * c.scale, score + c.table[h, kv])

    def cubic(score, b, h, q, kv):
        return score + c.cube[b, h, kv] * torch.sigmoid(score)

    def waves(score, b, h, q, kv):
        return score + torch.sin(0.1 * (q - kv)) * torch.exp(-torch.abs(score)) + torch.sqrt(1.0 + kv) * 0.01

    def integers(score, b, h, q, kv):
        return score + ((q // 7 + c.offsets[kv]) % 5 - 2) * 0.25 + torch.floor(kv / 64) * 0.125

    def minus_infinity(score, b, h, q, kv):
        return torch.where((q + kv) % 5 == 2, -float("inf"), score)

    return [alibi, capped, relative, by_key, cubic, waves, integers, minus_infinity]


def mask_functions(c):
    def causal(b, h, q, kv):
        return q >= kv

    def documents(b, h, q, kv):
        return (c.documents[b, q] == c.documents[b, kv]) & (q + 40 >= kv)

    def heads(b, h, q, kv):
        return ((q - kv) % (h + 1) == 0) | (kv < 4)

    return [None, causal, documents, heads]


def both(query, key, value, number, mask_number, block_size=128, lists_by_head=False, score=True):
    """(out, lse) on the GPU, and in float32 on the CPU."""
    results = []
    for device in ("cuda", "cpu"):
        captured = Captured(device)
        score_mod = score_functions(captured)[number] if score else None
        mask_mod = mask_functions(captured)[mask_number]
        q, k, v = (x.to(device) if device == "cuda" else x.float().cpu() for x in (query, key, value))
        mask = None
        if mask_mod is not None:
            batch, heads = (q.shape[0], q.shape[1]) if lists_by_head else (q.shape[0], None)
            sizes = (q.shape[2], k.shape[2])
            mask = flashspark.create_block_mask(mask_mod, batch, heads, *sizes, device=device, BLOCK_SIZE=block_size)
        results.append(flashspark.flex_attention(q, k, v, score_mod, mask, enable_gqa=True, return_lse=True))
    return results


def compare(results, dtype):
    (out, lse), (wanted, wanted_lse) = results
    out, lse = out.float().cpu(), lse.cpu()
    assert torch.equal(torch.isfinite(lse), torch.isfinite(wanted_lse))
    finite = torch.isfinite(wanted_lse)
    assert (lse - wanted_lse)[finite].abs().max() < 2e-2
    assert (out[~finite] == 0).all()
    assert (out - wanted).abs().max() < TOLERANCE[dtype] * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("mask", range(4))
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("width", [64, 128])
def test_functions(width, number, mask):
    data = tensors(2, 8, 2, 333, 333, width, torch.bfloat16, seed=number)
    compare(both(*data, number, mask), torch.bfloat16)


@pytest.mark.parametrize("width", [32, 80, 96, 192, 256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes(width, dtype):
    data = tensors(1, 4, 4, 200, 260, width, dtype)
    compare(both(*data, 3, 2 if width != 512 else 0), dtype)


@pytest.mark.parametrize("seqlen_q", [1, 3, 17])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_decode(seqlen_q, width):
    data = tensors(2, 8, 2, seqlen_q, 650, width, torch.bfloat16)
    compare(both(*data, 0, 0), torch.bfloat16)
    compare(both(*data, 4, 3), torch.bfloat16)


@pytest.mark.parametrize("heads_kv", [8, 4, 1])
@pytest.mark.parametrize("by_head", [False, True])
def test_lists_of_heads(heads_kv, by_head):
    data = tensors(2, 8, heads_kv, 300, 421, 128, torch.bfloat16)
    compare(both(*data, 1, 3, lists_by_head=by_head), torch.bfloat16)
    compare(both(*data, 1, 2, lists_by_head=by_head, block_size=(64, 256), score=False), torch.bfloat16)


# Blocks that no kernel's tile divides, or that are smaller than it: lists of tiles are derived on the GPU.
@pytest.mark.parametrize("block_size", [16, 32, 48, 80, (16, 128), (128, 16), (48, 64), (96, 112), (1024, 16)])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_block_sizes(width, block_size):
    data = tensors(2, 8, 2, 300, 421, width, torch.bfloat16)
    compare(both(*data, 1, 2, block_size=block_size), torch.bfloat16)
    compare(both(*data, 1, 3, lists_by_head=True, block_size=block_size, score=False), torch.bfloat16)


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("seqlen_q", [1, 200])
def test_lists_count_keys_behind_the_left_padding(seqlen_q, block_size):
    from flashspark._block_mask import to_block_sparse_tensors
    from flashspark._call import attend
    from flashspark._user_functions import attending

    def near(b, h, q, kv, info, aux):
        return (q + 200 >= kv) & (kv % 7 != h)

    def whole(b, h, q, kv):
        return (q + 200 >= kv) & (kv % 7 != h)

    query, key, value = tensors(3, 4, 2, seqlen_q, 500, 64, torch.bfloat16)
    results = []
    for device in ("cuda", "cpu"):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))  # (B, S, H, D)
        q, k, v = (x.to(device) if device == "cuda" else x.float().cpu() for x in (q, k, v))
        lists = flashspark.create_block_mask(whole, None, None, seqlen_q, 500, device=device, BLOCK_SIZE=block_size)
        lengths, padding = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([500, 320, 77], [0, 37, 64]))
        call = attending(attend, None, near, None, None, to_block_sparse_tensors(lists))
        results.append(
            flashspark.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=lengths, cache_leftpad=padding, return_softmax_lse=True, _attend=call
            )
        )
    compare([(out.transpose(1, 2), lse) for out, lse in results], torch.bfloat16)


def test_a_list_decides():
    q, k, v = tensors(1, 2, 2, 256, 256, 64, torch.bfloat16)
    counts = torch.tensor([[[1, 0]]], dtype=torch.int32, device="cuda")
    indices = torch.tensor([[[[1, 0], [0, 0]]]], dtype=torch.int32, device="cuda")
    mask = flashspark.BlockMask.from_kv_blocks(counts, indices, counts * 0, indices, BLOCK_SIZE=128)
    out, lse = flashspark.flex_attention(q, k, v, block_mask=mask, return_lse=True)
    first = torch.softmax(q[:, :, :128].float() @ k[:, :, 128:].float().mT / 8, -1) @ v[:, :, 128:].float()
    assert (out[:, :, :128].float() - first).abs().max() < 2e-2
    assert (out[:, :, 128:] == 0).all() and torch.isinf(lse[:, :, 128:]).all()


@pytest.mark.parametrize("block_size", [128, 48])
def test_wild_lists_stay_within_the_tensors(block_size):
    q, k, v = tensors(1, 4, 2, 2 * block_size, 3 * block_size, 64, torch.bfloat16)
    counts = torch.tensor([[[99, -3]]], dtype=torch.int32, device="cuda")
    indices = torch.full((1, 1, 2, 3), 1 << 30, dtype=torch.int32, device="cuda")
    mask = flashspark.BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=block_size, compute_q_blocks=False, seq_lengths=(2 * block_size, 3 * block_size)
    )
    flashspark.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    torch.cuda.synchronize()


def test_an_index_out_of_range_reads_the_nearest():
    q, k, v = tensors(1, 2, 2, 128, 128, 64, torch.bfloat16)
    table = torch.arange(4.0, device="cuda")
    clamped = flashspark.flex_attention(q, k, v, lambda s, b, h, i, j: s + table[torch.clamp(j - 60, -4, 3)])
    assert torch.equal(flashspark.flex_attention(q, k, v, lambda s, b, h, i, j: s + table[j - 60]), clamped)


def test_a_graph_sees_new_contents():
    q, k, v = tensors(1, 4, 2, 256, 256, 128, torch.bfloat16)
    slopes = torch.rand(4, device="cuda")

    def alibi(score, b, h, i, j):
        return score + slopes[h] * (j - i)

    call = lambda: flashspark.flex_attention(q, k, v, alibi, enable_gqa=True)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in range(3):
        slopes.copy_(torch.rand(4, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, call())


def test_threads_share_one_kernel():
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = tensors(1, 2, 2, 128, 128, 64, torch.bfloat16)
    number = 0.123456
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda _: flashspark.flex_attention(q, k, v, lambda s, b, h, i, j: s * number), range(8)))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("name", ["kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"])
def test_a_list_on_another_device(name):
    q, k, v = tensors(1, 4, 2, 200, 200, 64, torch.bfloat16)
    mask = flashspark.create_block_mask(lambda b, h, i, j: (i >= j) & (j % 3 != h), 1, 4, 200, 200, device="cuda")
    setattr(mask, name, getattr(mask, name).cpu())
    with pytest.raises(ValueError, match=rf"^block_mask\.{name}\.device = cpu"):
        flashspark.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    table = torch.rand(200)
    with pytest.raises(ValueError, match="device = cpu"):
        flashspark.flex_attention(q, k, v, lambda s, b, h, i, j: s + table[j], enable_gqa=True)
