"""Block masks beside torch's: the same lists, texts and slices; torch's objects are accepted. Skipped without torch."""

from __future__ import annotations

import numpy as np
import pytest
from flashspark import _block_mask as ours
from flashspark._trace import trace

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("torch.nn.attention.flex_attention")

generator = torch.Generator().manual_seed(0)
DOCS = torch.randint(0, 4, (700,), generator=generator).sort().values
BY_BATCH = torch.tensor([100, 333])
TABLE = torch.randint(0, 2, (700, 700), generator=generator).bool()


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return q - k < 100


def documents(b, h, q, k):
    return DOCS[q] == DOCS[k]


MASKS = {
    "causal": causal,
    "sliding": lambda b, h, q, k: (q >= k) & (q - k <= 77),
    "two sides": lambda b, h, q, k: torch.abs(q - k) < 50,
    "documents": documents,
    "prefix": lambda b, h, q, k: (k < 130) | (q >= k),
    "padding": lambda b, h, q, k: k < BY_BATCH[b],
    "heads": lambda b, h, q, k: (q - k) * (h + 1) < 200,
    "dilated": lambda b, h, q, k: (q - k) % 2 == 0,
    "blocks": lambda b, h, q, k: q // 128 == k // 128,
    "table": lambda b, h, q, k: TABLE[q, k],
    "strict": lambda b, h, q, k: q > k,
    "logic": lambda b, h, q, k: torch.logical_and(q >= k, torch.logical_not(DOCS[k] == 2)),
    "nothing": lambda b, h, q, k: q < 0,
    "theirs together": theirs.and_masks(causal, theirs.or_masks(window, documents)),
    "ours together": ours.and_masks(causal, ours.or_masks(window, documents)),
    "noop": theirs.noop_mask,
}
FIELDS = (*ours._LISTS, *ours._Q_LISTS)
SIZES = [((1, 1, 256, 256), 128), ((2, 3, 300, 655), 128), ((2, 2, 129, 64), (64, 32)), ((1, 2, 1, 700), 128)]


def same(got, want):
    for name in FIELDS:
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == b.dtype == torch.int32 and a.device == b.device, name
        torch.testing.assert_close(a, b, msg=name)
    assert got.shape == want.shape and got.BLOCK_SIZE == want.BLOCK_SIZE and got.seq_lengths == want.seq_lengths


@pytest.mark.parametrize(("shape", "size"), SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_create(name, shape, size):
    got = ours.create_block_mask(MASKS[name], *shape, device="cpu", BLOCK_SIZE=size)
    want = theirs.create_block_mask(MASKS[name], *shape, device="cpu", BLOCK_SIZE=size)
    same(got, want)
    assert got.sparsity() == pytest.approx(want.sparsity()) and got.numel() == want.numel()
    torch.testing.assert_close(got.to_dense(), want.to_dense())
    assert got.to_string() == want.to_string() and str(got) == str(want)
    assert got.to_string(grid_size=(3, 2), limit=1) == want.to_string(grid_size=(3, 2), limit=1)


def test_defaults():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    got = ours.create_block_mask(causal, None, None, 256, 300)
    same(got, theirs.create_block_mask(causal, None, None, 256, 300, device=device))
    assert type(got.kv_indices) is torch.Tensor and got.mask_mod is causal


@pytest.mark.parametrize("index", [0, -1, (1, 2), (slice(0, 1), slice(1, 3)), (0, slice(None), torch.tensor([1, 2]))])
def test_slices(index):
    got, want = (x.create_block_mask(MASKS["heads"], 2, 3, 400, 500, device="cpu") for x in (ours, theirs))
    for name in FIELDS[:4]:
        a, b = getattr(got[index], name), getattr(want[index], name)
        torch.testing.assert_close(a.reshape(b.shape), b)


def test_as_block_mask():
    want = theirs.create_block_mask(documents, 1, 1, 300, 300, device="cpu")
    got = ours.as_block_mask(want)
    same(got, want)
    assert got.kv_indices is want.kv_indices
    assert trace(got.mask_mod, "mask").tensors[0] is DOCS
    same(got.to("cpu"), want.to("cpu"))
    assert len(got.as_tuple()) == len(want.as_tuple()) and len(got.as_tuple(False)) == len(want.as_tuple(False))
    sliced = ours.as_block_mask(want[0])
    with pytest.raises(TypeError, match="sliced"):
        trace(sliced.mask_mod, "mask")


def test_their_class_takes_our_lists():
    got = ours.create_block_mask(causal, 1, 1, 256, 256, device="cpu")
    same(got, theirs.BlockMask(*got.as_tuple(flatten=False)))


def test_numpy_lists():
    mask = ours.create_block_mask(causal, 1, 1, 256, 256, "numpy")
    assert type(mask.kv_indices) is np.ndarray and type(mask.to("cpu").kv_indices) is np.ndarray
    assert mask.to("meta").kv_indices.device.type == "meta"


def test_noop_and_combinations_are_torch_functions():
    """Ours work in torch's create_block_mask, too."""
    for mask in (ours.noop_mask, ours.and_masks(), ours.or_masks(causal, window)):
        same(
            ours.create_block_mask(mask, 1, 1, 200, 300, device="cpu"),
            theirs.create_block_mask(mask, 1, 1, 200, 300, device="cpu"),
        )
