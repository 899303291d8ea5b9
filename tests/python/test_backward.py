"""flash_attn_backward on NumPy arrays, against differences of the formula in float64. Needs no torch."""

from __future__ import annotations

import flashspark
import ml_dtypes
import numpy as np
import pytest
from dropout_reference import dropped_dense
from problems import offsets
from reference import Options, attend_dense, attend_varlen, wide

STATE = (77, 2**40)
STEP = 1e-4


def arrays(rng, dtype, rows=13, keys=21, heads=(4, 2), dims=(16, 16)):
    shapes = (2, rows, heads[0], dims[0]), (2, keys, heads[1], dims[0]), (2, keys, heads[1], dims[1])
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in zip("qkv", shapes)}


def loss_of(formula, weights):
    """A function of float64 arrays that is differentiated: the weighted sum of out and of the finite lse."""

    def loss(given):
        out, lse = formula(given)
        return (out * weights[0]).sum() + (np.where(np.isfinite(lse), lse, 0) * weights[1]).sum()

    return loss


def slope(loss, given, name, direction):
    moved = [loss({**given, name: given[name] + sign * STEP * direction}) for sign in (1, -1)]
    return (moved[0] - moved[1]) / (2 * STEP)


TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def check(rng, given, formula, forward, backward, wanted, **options):
    """Along random directions the gradients have the formula's slopes."""
    names = list(given)
    out, lse = forward(**given, return_softmax_lse=True, **options)
    weights = [rng.standard_normal(x.shape) for x in (out, lse)]
    dout, dlse = weights[0].astype(out.dtype), weights[1].astype(np.float32)
    rows = {name: given.pop(name) for name in "qkv"}
    found = backward(dout, *rows.values(), out, lse, dlse=dlse, wanted=wanted, **given, **options)
    exact = {name: wide(x) for name, x in (rows | given).items()}
    loss = loss_of(formula, [wide(dout), wide(dlse)])
    assert len(found) == len(wanted)
    for name, gradient in zip(wanted, found):
        of = (rows | given)[name]
        assert gradient.shape == of.shape and gradient.dtype == (of.dtype if name in "qkv" else np.float32), name
        for _ in range(3):
            direction = rng.standard_normal(of.shape)
            want, got = slope(loss, exact, name, direction), (wide(gradient) * direction).sum()
            size = np.linalg.norm(wide(gradient))
            assert abs(got - want) <= TOLERANCE[str(rows["q"].dtype)] * max(size, 1.0), (name, got, want, size)
    assert set(names) >= set(wanted)


def formula_of(each=None, **options):
    def formula(given):
        own = {name: x for name, x in given.items() if name not in "qkv"}
        many = []
        for b in range(2):
            parts = {
                n: x[b] if n == "rel_logits" or (n == "alibi_slopes" and x.ndim == 2) else x for n, x in own.items()
            }
            many.append(Options(**options, **parts, **(each[b] if each else {})))
        return attend_dense(given["q"], given["k"], given["v"], many)

    return formula


def test_types(rng, dtype):
    names = ("q", "k", "v")
    given = arrays(rng, dtype)
    forward, backward = flashspark.flash_attn_func, flashspark.flash_attn_backward
    check(rng, given, formula_of(causal=True), forward, backward, names, causal=True)


@pytest.mark.parametrize(
    ("options", "masks"),
    [
        ({"window_size": (4, 2)}, {"left": 4, "right": 2}),
        ({"softcap": 2.0, "softmax_scale": 0.4}, {"softcap": 2.0, "softmax_scale": 0.4}),
        ({"deterministic": True, "num_threads": 2}, {}),
        ({"implementation": "cpu-reference", "causal": True}, {"causal": True}),
    ],
    ids=str,
)
def test_options(rng, options, masks):
    forward, backward = flashspark.flash_attn_func, flashspark.flash_attn_backward
    check(rng, arrays(rng, np.float32), formula_of(**masks), forward, backward, ("v", "k", "q"), **options)


def test_biases(rng):
    given = arrays(rng, np.float32)
    given |= {"sinks": rng.standard_normal(4).astype(np.float32)}
    given |= {"alibi_slopes": rng.uniform(0.05, 0.3, (2, 4)).astype(np.float32)}
    given |= {"rel_logits": rng.standard_normal((2, 13, 4, 6)).astype(np.float32)}
    names = tuple(given)
    forward, backward = flashspark.flash_attn_func, flashspark.flash_attn_backward
    check(rng, given, formula_of(causal=True), forward, backward, names, causal=True)


def test_dropout(rng):
    lost = dropped_dense(STATE, 0.3, 2, 4, 13, 21)
    each = [{"dropout_p": 0.3, "dropped": lost[b]} for b in range(2)]
    forward, backward = flashspark.flash_attn_func, flashspark.flash_attn_backward
    check(
        rng, arrays(rng, np.float32), formula_of(each), forward, backward, ("q", "k", "v"), dropout_p=0.3,
        rng_state=STATE,
    )  # fmt: skip


@pytest.mark.parametrize("dims", [(20, 12), (24, 8), (64, 32)], ids=str)
def test_head_sizes(rng, dims):
    forward, backward = flashspark.flash_attn_func, flashspark.flash_attn_backward
    check(rng, arrays(rng, np.float32, dims=dims), formula_of(), forward, backward, ("q", "k", "v"))


def test_varlen(rng):
    lengths = (5, 0, 12), (7, 3, 12)
    cu = [offsets(n) for n in lengths]
    shapes = (17, 4, 16), (22, 2, 16), (22, 2, 16)
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip("qkv", shapes)}
    given["sinks"] = rng.standard_normal(4).astype(np.float32)

    def formula(x):
        keys, values = ([x[name][cu[1][b] : cu[1][b + 1]] for b in range(3)] for name in "kv")
        return attend_varlen(x["q"], keys, values, cu[0], Options(causal=True, sinks=x["sinks"]))

    more = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "max_seqlen_q": 12, "max_seqlen_k": 12, "causal": True}
    forward, backward = flashspark.flash_attn_varlen_func, flashspark.flash_attn_varlen_backward
    check(rng, given, formula, forward, backward, ("q", "k", "v", "sinks"), **more)


def test_functions(rng):
    """score_mod in FlashAttention 4's form, with the gradient of what it reads; mask_mod; block lists."""
    given = arrays(rng, np.float32, rows=40, keys=40)
    bias, docs = rng.standard_normal((4, 40)).astype(np.float32), np.sort(rng.integers(0, 3, 40)).astype(np.int32)
    scales = rng.uniform(0.5, 1.5, 40)

    def score(s, b, h, q, k, info, aux):
        return s * aux[2][q] + aux[0][h, k] * aux[0][h, q]

    def mask(b, h, q, k, info, aux):
        return aux[1][q] == aux[1][k]

    options = {"score_mod": score, "mask_mod": mask, "aux_tensors": [bias, docs, scales]}
    out, lse = flashspark.flash_attn_func(**given, return_softmax_lse=True, **options)
    dout = rng.standard_normal(out.shape).astype(np.float32)
    dq, dk, dv, daux = flashspark.flash_attn_backward(
        dout, *given.values(), out, lse, wanted=("q", "k", "v", "aux_tensors"), **options
    )
    assert daux[1] is None and daux[0].shape == bias.shape and daux[2].shape == scales.shape

    def loss(x):
        q, k, v = (wide(x[name]) for name in "qkv")
        k, v = (np.repeat(y, 2, 2) for y in (k, v))
        s = np.einsum("bthd,bshd->bhts", q, k) / 4 * wide(x["scales"])[:, None]
        s = s + (x["bias"][:, None, :] * x["bias"][:, :, None])[None]
        s = np.where(docs[:, None] == docs, s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        return (np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), v) * dout).sum()

    exact = {name: wide(x) for name, x in {**given, "bias": bias, "scales": scales}.items()}
    for name, gradient in zip(exact, (dq, dk, dv, daux[0], daux[2])):
        direction = rng.standard_normal(gradient.shape)
        want, got = slope(loss, exact, name, direction), (wide(gradient) * direction).sum()
        assert abs(want - got) <= 1e-3 * max(np.linalg.norm(gradient), 1.0), (name, got, want)


def test_what_was_given_is_not_changed(rng):
    given = arrays(rng, ml_dtypes.bfloat16)
    out, lse = flashspark.flash_attn_func(**given, return_softmax_lse=True)
    dout = np.asfortranarray(out)
    before = [x.copy() for x in (*given.values(), out, lse, dout)]
    for x in (*given.values(), out, lse):
        x.flags.writeable = False
    found = flashspark.flash_attn_backward(dout, *given.values(), out, lse)
    again = flashspark.flash_attn_backward(out.copy(), *(x.copy() for x in given.values()), out, lse)
    for x, y in zip((*given.values(), out, lse, dout), before):
        assert (x == y).all()
    for x, y in zip(found, again):
        assert (x == y).all() and x.dtype == ml_dtypes.bfloat16


def test_one_gradient(rng):
    given = arrays(rng, np.float32)
    out, lse = flashspark.flash_attn_func(**given, return_softmax_lse=True)
    _, dk, dv = flashspark.flash_attn_backward(out, *given.values(), out, lse)
    np.testing.assert_array_equal(flashspark.flash_attn_backward(out, *given.values(), out, lse, wanted=["k"]), dk)
    np.testing.assert_array_equal(flashspark.flash_attn_backward(out, *given.values(), out, lse, wanted="v"), dv)
    assert "cpu-" in flashspark.flash_attn_backward(out, *given.values(), out, lse, explain=True)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"dout": None}, TypeError, "dout = None"),
        ({"dout": np.zeros((2, 13, 4, 8), np.float32)}, ValueError, r"dout\.shape\[3\] = 8: must be out's, 16"),
        ({"dout": np.zeros((2, 13, 4, 16), np.float16)}, TypeError, "dout.dtype = float16: must be q's"),
        ({"out": None}, TypeError, "out = None"),
        ({"softmax_lse": None}, TypeError, "softmax_lse = None"),
        ({"softmax_lse": np.zeros((2, 4, 12), np.float32)}, ValueError, r"softmax_lse\.shape\[2\] = 12"),
        ({"dlse": np.zeros((2, 4, 12), np.float32)}, ValueError, r"dlse\.shape\[2\] = 12"),
        ({"dlse": np.zeros((2, 4, 13), np.float16)}, TypeError, r"dlse\.dtype = float16"),
        ({"wanted": ("q", "bias")}, ValueError, "wanted = 'bias': must be of q, k, v"),
        ({"wanted": ("sinks",)}, ValueError, "wanted = 'sinks': must not name an argument that is not given"),
        ({"dropout_p": 0.5}, TypeError, "rng_state = None: must be given with dropout_p"),
        ({"dropout_p": 1.0, "rng_state": (1, 2)}, ValueError, "dropout_p = 1"),
        ({"softcap": -1.0}, ValueError, "softcap = -1"),
        ({"implementation": "cuda"}, (NotImplementedError, ValueError), "cuda"),
        ({"output_scale": np.ones(1, np.float32)}, (NotImplementedError, ValueError, TypeError), "out"),
        ({"causl": True}, TypeError, "causl"),
    ],
    ids=lambda x: "" if not isinstance(x, dict) else " ".join(x),
)
def test_errors(rng, change, error, text):
    given = arrays(rng, np.float32)
    out, lse = flashspark.flash_attn_func(**given, return_softmax_lse=True)
    call = {"dout": out, **given, "out": out, "softmax_lse": lse} | change
    with pytest.raises(error, match=text):
        flashspark.flash_attn_backward(**call)


def test_pages_are_refused(rng):
    q = rng.standard_normal((4, 2, 16)).astype(np.float32)
    pages = rng.standard_normal((3, 16, 1, 16)).astype(np.float32)
    table, cu = np.array([[1], [2]], np.int32), offsets((2, 2))
    call = {"cu_seqlens_q": cu, "cu_seqlens_k": None, "max_seqlen_q": 2, "max_seqlen_k": 16, "block_table": table}
    out, lse = flashspark.flash_attn_varlen_func(q, pages, pages, **call, return_softmax_lse=True)
    with pytest.raises((NotImplementedError, ValueError), match="block_table"):
        flashspark.flash_attn_varlen_backward(out, q, pages, pages, out, lse, **call)
