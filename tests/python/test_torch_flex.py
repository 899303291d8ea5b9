"""flex_attention on torch tensors: against float64, and beside torch's own with torch's BlockMask. Skipped without
torch."""

from __future__ import annotations

import flashspark
import numpy as np
import pytest
from flashspark import create_block_mask, flex_attention, flex_explain
from flex_reference import check, kept_by, kept_by_lists, lists_of

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("torch.nn.attention.flex_attention")

from torch_arrays import back  # noqa: E402 - it needs torch

F = torch.nn.functional
B, H, Q, K, D = 2, 4, 45, 61, 32
generator = torch.Generator().manual_seed(3)
SLOPES = torch.rand(H, generator=generator)
TABLE = torch.randn(B, H, Q, K, generator=generator)
BRAIN = torch.randn(H, K, generator=generator).bfloat16()
DOUBLE = torch.randn(K, generator=generator, dtype=torch.float64)
DOCS = torch.randint(0, 4, (64,), generator=generator).sort().values
SHORT = torch.randint(-50, 50, (64,), generator=generator, dtype=torch.int16)
FLAGS = torch.rand(64, generator=generator) < 0.5
CAP = torch.tensor(4.0)


class Bias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(H, 32, generator=generator), requires_grad=False)
        self.scale = 0.5

    def forward(self, score, b, h, q_idx, kv_idx):
        return score + self.scale * self.table[h, torch.clamp(q_idx - kv_idx, -16, 15) + 16]


SCORES = {
    "alibi": lambda s, b, h, q, k: s + SLOPES[h] * (k - q) / 8,
    "softcap": lambda s, b, h, q, k: 2.5 * torch.tanh(s / 2.5),
    "softcap by a tensor": lambda s, b, h, q, k: CAP * torch.tanh(s / CAP),
    "bias of 4 dimensions": lambda s, b, h, q, k: s + TABLE[b, h, q, k],
    "bfloat16": lambda s, b, h, q, k: s + BRAIN[h, k],
    "float64": lambda s, b, h, q, k: s * DOUBLE[k],
    "int16 and int64": lambda s, b, h, q, k: s + SHORT[k] / 50 + DOCS[q] * 0.25,
    "bool": lambda s, b, h, q, k: torch.where(FLAGS[k] | (DOCS[q] == DOCS[k]), s * 1.5, s - 1),
    "float methods": lambda s, b, h, q, k: s + (q - k).float().abs().sqrt().neg() / 4,
    "functions": lambda s, b, h, q, k: torch.sigmoid(s) + F.silu(s) + torch.erf(s) + torch.rsqrt(s * s + 1),
    "more functions": lambda s, b, h, q, k: torch.exp(s.clamp(max=1)) + torch.log1p(s.abs()) + torch.special.expit(s),
    "masked fill": lambda s, b, h, q, k: s.masked_fill((q + k) % 5 == 0, float("-inf")),
    "modulo": lambda s, b, h, q, k: s + torch.remainder(q - k, 7) * 0.1 + torch.div(k, 9, rounding_mode="floor") * 0.1,
    "module": Bias(),
}  # fmt: skip
MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "sliding": lambda b, h, q, k: (q >= k) & (q - k <= 9),
    "documents": lambda b, h, q, k: DOCS[q] == DOCS[k],
    "heads": lambda b, h, q, k: (q - k) * (h + 1) < 40 * (b + 1),
    "nothing for some": lambda b, h, q, k: q % 3 != 0,
}


def on_numpy(function):
    """A function of torch tensors, on NumPy arrays."""
    return lambda *args: torch.as_tensor(function(*map(torch.as_tensor, args))).numpy()


def qkv(kv_heads=H, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, Q, D), (B, kv_heads, K, D), (B, kv_heads, K, D)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def wide(tensors):
    """As NumPy arrays for the oracle, in a type of the same precision."""
    import ml_dtypes

    names = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
    return [back(x).astype(names[x.dtype]) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCORES)
def test_score_functions(name, dtype):
    tensors = qkv(2, dtype)
    score, mask_mod = SCORES[name], list(MASKS.values())[len(name) % len(MASKS)]
    mask = create_block_mask(mask_mod, B, H, Q, K, device="cpu", BLOCK_SIZE=(16, 32))
    out, lse = flex_attention(*tensors, score, mask, enable_gqa=True, return_lse=True)
    assert out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
    keep = kept_by(on_numpy(mask_mod), B, H, Q, K)
    check(back(out).astype(wide([out])[0].dtype), *wide(tensors), on_numpy(score), keep, lse=lse.numpy())


@pytest.mark.parametrize("name", MASKS)
def test_block_masks_of_torch(name):
    """torch's objects, taken as they are, in all sizes and for each head or for all."""
    tensors = qkv()
    keep = kept_by(on_numpy(MASKS[name]), B, H, Q, K)
    shapes = [(B, H)] if name == "heads" else [(None, None), (B, None), (None, H)]
    for size, shape in zip((128, 16, (32, 16)), shapes * 3):
        mask = theirs.create_block_mask(MASKS[name], *shape, Q, K, device="cpu", BLOCK_SIZE=size)
        out, lse = flex_attention(*tensors, SCORES["alibi"], mask, return_lse=True)
        check(out.numpy(), *wide(tensors), on_numpy(SCORES["alibi"]), keep, lse=lse.numpy())


def test_beside_torch():
    tensors, score = qkv(2), SCORES["alibi"]
    mask = theirs.create_block_mask(MASKS["nothing for some"], None, None, Q, K, device="cpu")
    for options in ({}, {"scale": 0.1}):
        want, want_lse = theirs.flex_attention(*tensors, score, mask, enable_gqa=True, return_lse=True, **options)
        got, lse = flex_attention(*tensors, score, mask, enable_gqa=True, return_lse=True, **options)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(lse, want_lse, rtol=2e-5, atol=2e-5)
    assert lse[0, 0, 3] == -torch.inf and (got[0, 0, 3] == 0).all()


def test_lists_of_torch(rng):
    """Lists that torch's class holds, whatever the mask function says."""
    kinds = rng.integers(0, 3, (B, H, 3, 2))
    lists = [torch.from_numpy(x) for kind in (1, 2) for x in lists_of(rng, kinds, kind)]
    for x in lists[1::2]:
        x.clamp_(max=1)  # torch's class transposes the lists, with what lies past the counts
    mask = theirs.BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=(16, 32), mask_mod=MASKS["causal"], seq_lengths=(Q, K), compute_q_blocks=False
    )
    tensors = qkv()
    keep = kept_by_lists(kinds, (16, 32), on_numpy(MASKS["causal"]), B, H, Q, K)
    check(flex_attention(*tensors, block_mask=mask).numpy(), *wide(tensors), None, keep)
    with pytest.raises((RuntimeError, flashspark.TraceError), match="sliced"):
        flex_attention(*(x[:1] for x in tensors), block_mask=mask[0])


def test_contents_change_in_place():
    tensors, bias = qkv(), torch.zeros(H, K)

    def score(s, b, h, q, k):
        return s + bias[h, k]

    for _ in range(2):
        check(flex_attention(*tensors, score).numpy(), *wide(tensors), on_numpy(score))
        bias += torch.randn(H, K, generator=generator)


def test_masks_changed_in_place_need_their_lists():
    tensors = [x[..., :Q, :] for x in qkv()]
    mask = create_block_mask(MASKS["causal"], None, None, Q, Q, device="cpu", BLOCK_SIZE=16)
    assert "block lists" not in flex_explain(*tensors, block_mask=mask)
    assert "block lists" not in flex_explain(*tensors, block_mask=mask.to("cpu"))
    mask.full_kv_num_blocks[0, 0, 2] = 0
    for changed in (mask, mask.to("cpu")):
        assert "block lists" in flex_explain(*tensors, block_mask=changed)
    made_by_torch = theirs.create_block_mask(MASKS["causal"], None, None, Q, Q, device="cpu", BLOCK_SIZE=16)
    assert "block lists" in flex_explain(*tensors, block_mask=made_by_torch)


def test_without_gradients():
    q, k, v = qkv()
    table = torch.randn(H, K, requires_grad=True)
    slopes = torch.rand(H, requires_grad=True)
    for score in (
        lambda s, b, h, q, k: s + table[h, k],
        lambda s, b, h, q, k: s - slopes[h] * (q - k).abs(),  # alibi, which is built in
    ):
        tensors = (q, k[:, :, :Q], v[:, :, :Q])
        assert flex_attention(*tensors, score).requires_grad
        with torch.no_grad():
            out = flex_attention(*tensors, score)
            assert not out.requires_grad
            check(out.numpy(), *wide(tensors), on_numpy(score))
    with torch.inference_mode():
        mask = create_block_mask(MASKS["causal"], None, None, Q, K, device="cpu")
        assert flex_attention(q, k, v, block_mask=mask).shape == q.shape


def test_layouts_and_aux():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    out, aux = flex_attention(q, k, v, SCORES["alibi"], return_aux=theirs.AuxRequest(lse=True))
    check(out.numpy(), *wide((q, k, v)), on_numpy(SCORES["alibi"]), lse=aux.lse.numpy())
    with pytest.raises(NotImplementedError, match="max_scores"):
        flex_attention(q, k, v, return_aux=theirs.AuxRequest(max_scores=True))


def test_arrays_of_several_libraries():
    """NumPy arrays captured beside torch tensors; lists of NumPy arrays."""
    tensors, bias = qkv(), SLOPES.numpy()
    mask = create_block_mask(MASKS["documents"], None, None, Q, K, device="numpy", BLOCK_SIZE=16)
    score = lambda s, b, h, q, k: s + bias[h] * (k - q)  # noqa: E731
    got = flex_attention(*tensors, score, mask).numpy()
    check(got, *wide(tensors), score, kept_by(on_numpy(MASKS["documents"]), B, H, Q, K))


def test_flash_attn_func_with_functions():
    """FlashAttention 4's form on torch tensors, with gradients."""
    q, k, v = (x.transpose(1, 2) for x in qkv(2))

    def score(s, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        return s + aux_tensors[0][h_idx, kv_idx]

    got = flashspark.flash_attn_func(q, k, v, score_mod=score, aux_tensors=[BRAIN])
    plain = on_numpy(lambda s, b, h, q, k: s + BRAIN[h, k])
    check(got.transpose(1, 2).numpy(), *wide(x.transpose(1, 2) for x in (q, k, v)), plain)
    learned = [torch.rand(H, K, requires_grad=True)]
    assert flashspark.flash_attn_func(q, k, v, score_mod=score, aux_tensors=learned).requires_grad
    with pytest.raises(ValueError, match=r"requires_grad = True.*for flash_attn_with_kvcache"):
        flashspark.flash_attn_with_kvcache(q, k, v, score_mod=score, aux_tensors=learned)


def test_jax():
    jax = pytest.importorskip("jax")
    tensors = [jax.numpy.asarray(x.numpy()) for x in qkv(2)]
    slopes, docs = jax.numpy.asarray(SLOPES.numpy()), jax.numpy.asarray(DOCS.numpy())
    mask = create_block_mask(lambda b, h, q, k: docs[q] == docs[k], None, None, Q, K, device="numpy")
    out, lse = flex_attention(
        *tensors, lambda s, b, h, q, k: s + slopes[h] * jax.numpy.abs(k - q), mask, enable_gqa=True, return_lse=True
    )
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    score = on_numpy(lambda s, b, h, q, k: s + SLOPES[h] * (k - q).abs())
    check(np.asarray(out), *map(np.asarray, tensors), score, kept_by(on_numpy(MASKS["documents"]), B, H, Q, K))
