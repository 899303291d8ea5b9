"""flex_attention and FlashAttention 4's functions on arrays of other libraries: JAX on the CPU, and a stand-in for
CuPy."""

from __future__ import annotations

import sys

import cupy_stand_in
import flashspark
import ml_dtypes
import numpy as np
import pytest
from flashspark import BlockMask, BlockSparseTensors, create_block_mask, flex_attention
from flashspark.mods import scalar
from flex_reference import check, kept_by, kept_by_lists, lists_of
from problems import offsets

B, H, Q, K, D = 2, 4, 37, 53, 16
RNG = np.random.default_rng(5)
SLOPES = RNG.random(H).astype(np.float32)
BIAS = RNG.standard_normal((H, K)).astype(np.float16)
DOCS = np.sort(RNG.integers(0, 4, 64)).astype(np.int32)
FACTOR = scalar(0.5)


@pytest.fixture(params=["jax", "cupy"])
def library(request, monkeypatch):
    """(the library's functions, a function that makes its array of NumPy's, one that brings it back)."""
    if request.param == "jax":
        jax = pytest.importorskip("jax")
        return jax.numpy, jax.numpy.asarray, np.asarray
    cupy = cupy_stand_in.module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy, lambda x: cupy_stand_in.ndarray(x.copy()), lambda x: x.get()


def qkv(normal, dtype=np.float32, kv_heads=2, batch=B):
    shapes = (B, H, Q, D), (batch, kv_heads, K, D), (batch, kv_heads, K, D)
    return [normal(*shape, dtype=dtype) for shape in shapes]


def test_score_functions(library, normal):
    """Captured arrays and the library's own functions; a result of the same library."""
    xp, made, back = library
    slopes, bias, number = made(SLOPES), made(BIAS), made(np.array(1.5, np.float32))

    def alibi(s, b, h, q, k):
        return s + slopes[h] * (k - q) * FACTOR

    def own_functions(s, b, h, q, k):
        return xp.where(k % 3 == 0, xp.tanh(s) * number, s + bias[h, k]) + xp.exp(-xp.abs(s))

    plain = {
        alibi: lambda s, b, h, q, k: s + SLOPES[h] * (k - q) * FACTOR.value,
        own_functions: lambda s, b, h, q, k: (
            np.where(k % 3 == 0, np.tanh(s) * 1.5, s + BIAS[h, k]) + np.exp(-np.abs(s))
        ),
    }
    for dtype in (np.float32, np.float16):
        tensors = qkv(normal, dtype)
        for score, wanted in plain.items():
            for _ in range(2):
                out, lse = flex_attention(*map(made, tensors), score, enable_gqa=True, return_lse=True)
                assert type(out) is type(lse) is type(made(BIAS)) and out.dtype == dtype
                check(back(out), *tensors, wanted, lse=back(lse))


def test_jax_in_bfloat16(normal):
    jax = pytest.importorskip("jax")
    tensors = qkv(normal, ml_dtypes.bfloat16)
    table = jax.numpy.asarray(BIAS.astype(ml_dtypes.bfloat16))
    out = flex_attention(*map(jax.numpy.asarray, tensors), lambda s, b, h, q, k: s + table[h, k], enable_gqa=True)
    assert out.dtype == jax.numpy.bfloat16
    check(np.asarray(out), *tensors, lambda s, b, h, q, k: s + np.asarray(table)[h, k])


def test_masks(library, normal):
    """A mask function that captures an array, in a mask whose lists are NumPy's, and in one whose lists are the
    library's."""
    _, made, back = library
    docs, tensors = made(DOCS), qkv(normal)

    def documents(b, h, q, k):
        return docs[q] == docs[k]

    plain = lambda b, h, q, k: DOCS[q] == DOCS[k]  # noqa: E731
    mask = create_block_mask(documents, None, None, Q, K, "numpy", 16)
    out, lse = flex_attention(*map(made, tensors), None, mask, enable_gqa=True, return_lse=True)
    check(back(out), *tensors, None, kept_by(plain, B, H, Q, K), lse=back(lse))
    kinds = RNG.integers(0, 3, (1, H, 3, 4))
    lists = [made(x) for kind in (1, 2) for x in lists_of(RNG, kinds, kind)]
    mask = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=16, mask_mod=documents, seq_lengths=(Q, K), compute_q_blocks=False
    )
    for _ in range(2):
        out, lse = flex_attention(*map(made, tensors), None, mask, enable_gqa=True, return_lse=True)
        check(back(out), *tensors, None, kept_by_lists(kinds, (16, 16), plain, B, H, Q, K), lse=back(lse))


def test_one_sequence_of_keys_for_all(library, normal):
    _, made, back = library
    tensors = qkv(normal, batch=1)
    out = flex_attention(*map(made, tensors), lambda s, b, h, q, k: s * (b + 1), enable_gqa=True)
    check(back(out), *tensors, lambda s, b, h, q, k: s * (b + 1))


def test_contents_may_change(normal, monkeypatch):
    cupy = cupy_stand_in.module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    tensors, memory = qkv(normal), SLOPES.copy()
    slopes = cupy_stand_in.ndarray(memory)
    score = lambda s, b, h, q, k: s - slopes[h] * abs(q - k)  # noqa: E731
    plain = lambda s, b, h, q, k: s - memory[h] * abs(q - k)  # noqa: E731
    for _ in range(3):
        out = flex_attention(*map(cupy_stand_in.ndarray, tensors), score, enable_gqa=True)
        check(out.get(), *tensors, plain)
        memory *= -0.5


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_4s_functions(library, normal, rng, packed):
    _, made, back = library
    q, k, v = (x.transpose(0, 2, 1, 3) for x in qkv(normal))
    kinds = rng.integers(0, 3, (B, 1, 3, 4))
    lists = BlockSparseTensors(*(made(x) for kind in (1, 2) for x in lists_of(rng, kinds, kind)), (16, 16))

    def score(s, b, h, i, j, info, aux):
        return s + aux[0][h] * (j - i) + aux[1][h, j]

    def mask(b, h, i, j, info, aux):
        return (j + i) % 5 != 2

    options = {"score_mod": score, "mask_mod": mask, "aux_tensors": [made(SLOPES), made(BIAS)]}
    options |= {"block_sparse_tensors": lists, "return_softmax_lse": True}
    if packed:
        flat = [made(x.reshape(-1, *x.shape[2:])) for x in (q, k, v)]
        cu = made(offsets([Q] * B)), made(offsets([K] * B))
        out, lse = flashspark.flash_attn_varlen_func(*flat, *cu, Q, K, **options)
        out, lse = back(out).reshape(q.shape), back(lse).reshape(H, B, Q).swapaxes(0, 1)
    else:
        out, lse = map(back, flashspark.flash_attn_func(*map(made, (q, k, v)), **options))
    keep = kept_by_lists(kinds, (16, 16), lambda b, h, i, j: (j + i) % 5 != 2, B, H, Q, K)
    plain = lambda s, b, h, i, j: s + SLOPES[h] * (j - i) + BIAS[h, j]  # noqa: E731
    check(out.transpose(0, 2, 1, 3), *(x.transpose(0, 2, 1, 3) for x in (q, k, v)), plain, keep, lse=lse)


def test_inside_jit(normal):
    """A tracer has no memory to compute on: the error says so."""
    jax = pytest.importorskip("jax")
    tensors = [jax.numpy.asarray(x) for x in qkv(normal)]
    with pytest.raises(TypeError, match=r"query = a tracer of jax\.jit or another transformation: must be an array"):
        jax.jit(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True))(*tensors)
