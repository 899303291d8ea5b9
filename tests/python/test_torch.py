"""torch tensors through the package's functions, and torch_ops under torch.compile. Skipped without torch."""

from __future__ import annotations

import flashspark
import numpy as np
import pytest
from flashspark._call import FORWARD, attend
from problems import offsets, pages
from reference import Options, attend_dense, attend_varlen, close

torch = pytest.importorskip("torch")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(dtype, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def dense(dtype=torch.float32, b=2, tq=20, tk=33):
    return tensors(dtype, (b, tq, 4, 32), (b, tk, 2, 32), (b, tk, 2, 32))


def wide(x):
    return x.detach().to(torch.float64).numpy()


def name(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype):
    q, k, v = dense(dtype)
    out, lse = flashspark.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    want, want_lse = attend_dense(wide(q), wide(k), wide(v), Options(causal=True))
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
    close(wide(out), want, dtype=name(dtype))
    close(wide(lse), want_lse, dtype="float32", what="lse")


def test_fp8():
    q, k, v = (x.to(torch.float8_e4m3fn) for x in dense())
    scale = torch.full((1,), 1.5).expand(2, 2)
    out = flashspark.flash_attn_func(q, k, v, q_descale=scale, k_descale=scale, v_descale=scale)
    assert out.dtype == torch.bfloat16
    option = Options(q_descale=1.5, k_descale=1.5, v_descale=1.5)
    close(wide(out), attend_dense(wide(q), wide(k), wide(v), option)[0], dtype="bfloat16")
    small = flashspark.flash_attn_func(*dense(torch.bfloat16), output_scale=torch.full((1,), 0.02))
    assert small.dtype == torch.float8_e4m3fn


FRAMES = "\nException raised from malloc at file.cpp:1 (most recent call first):\nframe #0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])  # two ways through attend()
@pytest.mark.parametrize(
    ("line", "frames", "kind"),
    [
        ("CUDA out of memory. Tried to allocate 2 MiB.", FRAMES, torch.OutOfMemoryError),
        ("cuMemAllocAsync: CUDA_ERROR_OUT_OF_MEMORY (2)", "", torch.OutOfMemoryError),
        ("CUDA error: an illegal memory access was encountered", FRAMES, RuntimeError),
        ("out of memory", "", MemoryError),
    ],
)
def test_failures_of_the_allocator_are_torchs_own(dtype, line, frames, kind):
    calls = []

    def fails(*_):
        calls.append(1)
        raise MemoryError(line + frames)

    q, k, v = (x.to(dtype) for x in dense())
    with pytest.raises(kind) as caught:
        attend(FORWARD, (q, k, v), None, None, False, False, (None,) * 9, (), fails)
    assert type(caught.value) is kind and str(caught.value) == line and len(calls) == 1


def test_views_and_given_results():
    fused = tensors(torch.bfloat16, (2, 20, 8, 32))[0]
    q, k, v = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    out = torch.zeros(2, 4, 20, 32, dtype=torch.bfloat16).transpose(1, 2)
    assert flashspark.flash_attn_func(q, k, v, out=out) is out
    close(wide(out), attend_dense(wide(q), wide(k), wide(v))[0], dtype="bfloat16")


def test_empty():
    q, k, v = dense()
    out, lse = flashspark.flash_attn_func(q, k[:, :0], v[:, :0], return_softmax_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert flashspark.flash_attn_func(q[:0], k[:0], v[:0]).shape == (0, 20, 4, 32)
    nothing = torch.empty(0, 4, 32)
    cu = torch.zeros(3, dtype=torch.int32)
    assert flashspark.flash_attn_varlen_func(nothing, k[0], v[0], cu, cu, 0, 0).shape == (0, 4, 32)


def paged_problem(dtype=torch.bfloat16):
    rng = np.random.default_rng(0)
    lengths = [(1, 41), (17, 17), (30, 90)]
    parts = [[rng.standard_normal((n, 2, 32)).astype(np.float32) for _, n in lengths] for _ in range(2)]
    parts = [[wide(torch.from_numpy(x).to(dtype)) for x in part] for part in parts]
    q = tensors(dtype, (48, 4, 32))[0]
    *caches, table = pages(rng, *parts, 16)
    cu = offsets([n for n, _ in lengths])
    used = torch.tensor([n for _, n in lengths], dtype=torch.int32)
    want = attend_varlen(wide(q), *parts, cu, Options(causal=True))
    arrays = (q, *(torch.from_numpy(x).to(dtype) for x in caches))
    return arrays, torch.from_numpy(cu), used, torch.from_numpy(table), want


def test_paged_varlen():
    arrays, cu, used, table, (want, want_lse) = paged_problem()
    out, lse = flashspark.flash_attn_varlen_func(
        *arrays, cu, None, 30, 90, block_table=table, seqused_k=used, causal=True, return_softmax_lse=True
    )
    close(wide(out), want, dtype="bfloat16")
    close(wide(lse), want_lse, dtype="float16", what="lse")
    cu_k = torch.cat([torch.zeros(1, dtype=torch.int32), used.cumsum(0).to(torch.int32)])
    again = flashspark.flash_attn_varlen_func(*arrays, cu, cu_k, 30, 90, block_table=table, causal=True)
    assert torch.equal(again, out)


def test_kvcache_with_rotary():
    q, k, v = tensors(torch.float32, (2, 3, 4, 32), (2, 3, 2, 32), (2, 3, 2, 32))
    k_cache, v_cache = tensors(torch.float32, (2, 40, 2, 32), (2, 40, 2, 32), seed=1)
    angle = torch.arange(40)[:, None] / 10 ** torch.linspace(0, 3, 8)
    cos, sin = angle.cos(), angle.sin()
    lens = torch.tensor([5, 30], dtype=torch.int32)
    copies = [x.numpy().copy() for x in (k_cache, v_cache)]
    before = q.clone()
    got = flashspark.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lens, causal=True
    )
    want = flashspark.flash_attn_with_kvcache(
        q.numpy(), *copies, k.numpy(), v.numpy(), rotary_cos=cos.numpy(), rotary_sin=sin.numpy(),
        cache_seqlens=lens.numpy(), causal=True,
    )  # fmt: skip
    np.testing.assert_array_equal(got.numpy(), want)
    np.testing.assert_array_equal(k_cache.numpy(), copies[0])
    assert torch.equal(q, before)
    flashspark.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7)


def test_gradients_that_there_are_not_are_refused_clearly():
    q, k, v = dense()
    q.requires_grad_()
    with pytest.raises(ValueError, match=r"q\.requires_grad = True.*no_grad.*for flash_attn_with_kvcache"):
        flashspark.flash_attn_with_kvcache(q, k, v)
    with pytest.raises(ValueError, match=r"q\.requires_grad = True.*no_grad.*beside out"):
        flashspark.flash_attn_func(q, k, v, out=torch.empty_like(q))
    with pytest.raises(ValueError, match=r"q\.requires_grad = True.*for k\.dtype = float8_e4m3fn"):
        flashspark.flash_attn_func(q, *(x.to(torch.float8_e4m3fn) for x in (k, v)))
    with torch.no_grad():
        assert flashspark.flash_attn_with_kvcache(q, k, v).shape == q.shape


def test_mixed_numpy_and_torch():
    q, k, v = dense()
    np.testing.assert_array_equal(
        flashspark.flash_attn_func(q.numpy(), k, v), flashspark.flash_attn_func(q, k, v).numpy()
    )


def test_devices():
    q, k, v = dense()
    with pytest.raises(NotImplementedError, match=r"k\.device = meta"):
        flashspark.flash_attn_func(q, k.to("meta"), v.to("meta"))


def test_fake_tensors_return_without_computing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = torch.empty(6, 4, 32), torch.empty(9, 2, 32), torch.empty(9, 2, 16)
        cu = torch.empty(3, dtype=torch.int32)
        out, lse = flashspark._flash_attn_fwd(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
        assert out.shape == (6, 4, 16) and lse.shape == (4, 6)


def test_operators_are_well_formed():
    from flashspark import torch_ops

    q, k, v = dense()
    head = (None, True, -1, -1, 0.0, 0, False, None, 0)
    for want_lse in (False, True):
        torch.library.opcheck(torch.ops.flashspark.attention.default, (q, k, v, *head, *torch_ops.NO_TAIL, want_lse))
    out, lse = torch.empty_like(q), torch.empty(2, 4, 20)
    torch.library.opcheck(torch.ops.flashspark.attention_out.default, (q, k, v, *head, *torch_ops.NO_TAIL, out, lse))
    cache = [torch.zeros(2, 50, 2, 32) for _ in range(2)]
    lens = torch.tensor([3, 4], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.flashspark.append_kv.default,
        (k, v, *cache, lens, None, None, None, None, None, None, None, True, True, None, None),
    )
    slots = torch.tensor([70, -1, 3])
    torch.library.opcheck(
        torch.ops.flashspark.append_kv.default,
        (k[0], v[0], *cache, *(None,) * 8, True, True, None, None, slots),
    )


def test_operators_equal_the_functions():
    from flashspark import torch_ops

    q, k, v = dense()
    for options in ({}, {"causal": True, "window_size": (5, None)}, {"sinks": torch.ones(4), "softcap": 2}):
        want = flashspark.flash_attn_func(q, k, v, return_softmax_lse=True, **options)
        got = torch_ops.flash_attn_func(q, k, v, return_softmax_lse=True, **options)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    out = torch.empty_like(q)
    assert torch_ops.flash_attn_func(q, k, v, out=out) is out
    assert torch.equal(out, flashspark.flash_attn_func(q, k, v))
    arrays, cu, used, table, _ = paged_problem()
    options = {"block_table": table, "seqused_k": used, "causal": True}
    want = flashspark.flash_attn_varlen_func(*arrays, cu, None, 30, 90, **options)
    assert torch.equal(torch_ops.flash_attn_varlen_func(*arrays, cu, None, 30, 90, **options), want)
    with pytest.raises(ValueError, match=r"softcap = -1"):
        torch_ops.flash_attn_func(q, k, v, softcap=-1.0)


@pytest.mark.parametrize("cache_type", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_slot_mapping(cache_type):
    from flashspark import torch_ops

    k, v = torch.randn(9, 2, 32), torch.randn(9, 2, 32)
    slots = torch.tensor([40, -1, 0, 17, 18, 59, -1])
    want, kept = torch.zeros(2, 60, 2, 32), slots >= 0
    for cache, rows in zip(want, (k, v)):
        cache[slots[kept]] = rows[:7][kept].to(cache_type).float()
    compiled = torch.compile(torch_ops.append_kv, fullgraph=True, backend="aot_eager")
    for append in (flashspark.append_kv, torch_ops.append_kv, compiled):
        pages = torch.zeros(2, 5, 12, 2, 32, dtype=cache_type)
        append(k, v, *pages, slot_mapping=slots)
        assert torch.equal(pages.float().view_as(want), want)
        append(k, v, *pages, slot_mapping=torch.empty(0, dtype=torch.int64))  # has no data pointer
        assert torch.equal(pages.float().view_as(want), want)
    cos, sin = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(30, 1).chunk(2, -1)  # even positions turn by 90
    turn = {"rotary_cos": cos, "rotary_sin": sin, "rotary_positions": torch.tensor([1, 0, 0, 3, 2, 1, 1, 0])}
    for append in (flashspark.append_kv, torch_ops.append_kv, compiled):
        pages, q = torch.zeros(2, 5, 12, 2, 32, dtype=cache_type), torch.randn(9, 4, 32)
        turned = q.clone()
        append(k, v, *pages, slot_mapping=slots, q=turned, **turn)
        even = turn["rotary_positions"][:7] % 2 == 0
        want_q = q.clone()
        want_q[:7][even, :, 0], want_q[:7][even, :, 1] = -q[:7][even, :, 1], q[:7][even, :, 0]
        assert torch.equal(turned, want_q)
        got = pages[0].float().view(60, 2, 32)
        assert torch.equal(got[40], want[0][40])
        assert torch.equal(got[0, :, 1], want[0][0, :, 0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_keeps_one_graph(dynamic):
    from flashspark import torch_ops

    def block(q, k, v, k_cache, v_cache, lens):
        a = torch_ops.flash_attn_func(q * 2, k, v, causal=True, window_size=(7, 0))
        b, lse = torch_ops.flash_attn_func(a, k, v, return_softmax_lse=True)
        c = torch_ops.flash_attn_with_kvcache(b, k_cache, v_cache, k, v, cache_seqlens=lens, causal=True)
        return c + 1, lse

    q, k, v = dense(tq=33)
    lens = torch.tensor([3, 40], dtype=torch.int32)
    caches = [[torch.zeros(2, 80, 2, 32) for _ in range(2)] for _ in range(2)]
    want = block(q, k, v, *caches[0], lens)
    # aot_eager traces with the fake implementations and checks mutation, and needs no compiler.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got = compiled(q, k, v, *caches[1], lens)
    for x, y in zip((*got, *caches[1]), (*want, *caches[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
