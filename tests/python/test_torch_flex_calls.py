"""Further calls of flex_attention with the same functions on torch tensors: what has changed since is seen."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.attention.flex_attention as theirs  # noqa: E402
from flashspark import _flex_call, create_block_mask, flex, flex_attention  # noqa: E402
from flex_reference import check, counted, kept_by  # noqa: E402

B, H, S, D = 2, 4, 48, 32


@pytest.fixture
def qkv(normal):
    return [torch.from_numpy(normal(B, H, S, D)) for _ in range(3)]


@pytest.fixture
def general(monkeypatch):
    """How many calls have taken the general path."""
    monkeypatch.setattr(_flex_call, "_known", {})
    return counted(monkeypatch, flex, "_run")


def back(x):
    x = x.detach().resolve_neg()
    return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype is torch.bfloat16 else x.numpy()


def both(tensors, score=None, on_numpy=None, mask=None, keep=None):
    out, lse = flex_attention(*tensors, score, mask, return_lse=True)
    check(back(out), *map(back, tensors), on_numpy, keep, lse=back(lse))
    return out


def causal(b, h, q, k):
    return q >= k


def prefix(b, h, q, k):
    return (k < 5) | (q >= k)


def masks(function):
    ours = create_block_mask(function, None, None, S, S, device="cpu", BLOCK_SIZE=16)
    return ours, theirs.create_block_mask(function, None, None, S, S, device="cpu", BLOCK_SIZE=16)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("function", [causal, prefix])
def test_warm_calls(qkv, general, which, function):
    mask, table = masks(function)[which], torch.randn(S)
    score = lambda s, b, h, q, k: s + table[k]  # noqa: E731
    keep = kept_by(function, B, H, S, S)
    for _ in range(3):
        both(qkv, score, lambda s, b, h, q, k: s + table.numpy()[k], mask, keep)
        table.normal_()
    half = [x.bfloat16() for x in qkv]
    assert both(half, score, lambda s, b, h, q, k: s + table.numpy()[k], mask, keep).dtype == torch.bfloat16
    assert len(general) == 1


@pytest.mark.parametrize("which", [0, 1])
def test_lists_changed_in_place(qkv, which):
    mask = masks(causal)[which]
    for _ in range(2):
        both(qkv, mask=mask, keep=kept_by(causal, B, H, S, S))
    mask.full_kv_num_blocks[..., 2] = 0
    keep = kept_by(causal, B, H, S, S).copy()
    keep[:, :, 32:, :32] = False
    for _ in range(2):
        both(qkv, mask=mask, keep=keep)


def test_memory_under_a_tensor(qkv, general):
    """A tensor's memory may be another at each call, as after an optimizer's or a loader's `data = ..`."""
    table = torch.randn(S)
    score = lambda s, b, h, q, k: s + table[k]  # noqa: E731
    for _ in range(3):
        both(qkv, score, lambda s, b, h, q, k: s + table.numpy()[k])
        table.data = torch.randn(2 * S)[::2]
    assert len(general) == 1
    table.data = torch.randn(S, dtype=torch.float64)
    both(qkv, score, lambda s, b, h, q, k: s + table.numpy()[k])


def test_parameters_and_gradients(qkv, general):
    table = torch.nn.Parameter(torch.randn(S))
    score = lambda s, b, h, q, k: s + table[k]  # noqa: E731
    with torch.no_grad():
        for _ in range(3):
            both(qkv, score, lambda s, b, h, q, k: s + back(table)[k])
            table.normal_()
    assert len(general) == 1
    assert flex_attention(*qkv, score).requires_grad
    table.requires_grad_(False)
    both(qkv, score, lambda s, b, h, q, k: s + back(table)[k])
    for place, name in enumerate(("query", "key", "value")):
        tensors = list(qkv)
        tensors[place] = tensors[place].clone().requires_grad_()
        assert flex_attention(*tensors, score).requires_grad, name
        with torch.no_grad():
            both(tensors, score, lambda s, b, h, q, k: s + back(table)[k])


def test_tensors_of_other_kinds(qkv, general):
    score = lambda s, b, h, q, k: s * 1.5  # noqa: E731
    on_numpy = score
    both(qkv, score, on_numpy)
    q, k, v = qkv
    both((q, k, torch._neg_view(v)), score, on_numpy)
    both((torch.nn.Parameter(q, requires_grad=False), k, v), score, on_numpy)
    out = both([x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv], score, on_numpy)
    assert out.transpose(1, 2).is_contiguous()
    with torch.inference_mode():
        both([x.clone() for x in qkv], score, on_numpy)
    with pytest.raises(TypeError, match=r"tensor inside torch\.func"):
        torch.func.vmap(lambda x: flex_attention(x, k, v, score))(q[None])
    with pytest.raises((TypeError, NotImplementedError), match="query"):
        flex_attention(q.to("meta"), k.to("meta"), v.to("meta"), score)
    array = [x.numpy() for x in qkv]
    assert isinstance(flex_attention(*array, score), np.ndarray)


def test_a_mask_whose_function_is_set_again(qkv):
    for mask in masks(prefix):
        both(qkv, mask=mask, keep=kept_by(prefix, B, H, S, S))
        mask.mask_mod = lambda b, h, q, k: (k < 3) | (q >= k)
        keep = kept_by(mask.mask_mod, B, H, S, S)
        for _ in range(2):
            both(qkv, mask=mask, keep=keep)
