"""Guarantees to torch through every door: no gradient is lost silently, written tensors have their version incremented,
and lazily negated tensors are read and written by value."""

from __future__ import annotations

from dataclasses import replace

import flashspark
import numpy as np
import pytest
import test_doors
from flash_attn_grid import Case, make

pytest.importorskip("torch", reason="torch is not installed")

import torch  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch_arrays import back, moved  # noqa: E402

SMALL = Case(longest=(3, 9), dims=(16, 16), dtype="float32", heads=(2, 1), sinks=True, alibi=1, given=2)
CALLS = {
    "fp8": replace(SMALL, dtype="float8_e4m3fn", given=0),  # has factors, too
    "dense": replace(SMALL, given=0),
    "dense given": SMALL,
    "varlen": replace(SMALL, kind="varlen", given=0),
    "varlen given": replace(SMALL, kind="varlen"),
    "paged": replace(SMALL, kind="varlen", page_size=4),
    "cache": replace(SMALL, kind="cache", new=2, rotary=1.0, causal=True),
    "cache paged": replace(SMALL, kind="cache", new=2, rotary=1.0, causal=True, page_size=4),
}
DOORS = {
    "torch": lambda function, given: getattr(flashspark, function)(**given),
    "operator": lambda function, given: getattr(_operators(), function)(**given),
    "compiled": lambda function, given: torch.compile(
        getattr(_operators(), function), fullgraph=True, backend="aot_eager"
    )(**given),
}


def _operators():
    from flashspark import torch_ops

    return torch_ops


def differentiable(name: str) -> list[str]:
    call = make(CALLS[name])
    return [n for n, x in call.arrays.items() if moved(x).is_floating_point() and moved(x).itemsize > 1]


def flows(name: str, argument: str) -> bool:
    """Whether the argument of this call gets a gradient."""
    return name in ("dense", "varlen") and argument not in ("out", "lse")


GRADIENTS = [(c, n, d) for c in CALLS for d in DOORS for n in differentiable(c) if d != "compiled" or "paged" not in c]


@pytest.mark.parametrize(("name", "argument", "door"), GRADIENTS, ids=["-".join(g) for g in GRADIENTS])
def test_no_gradient_is_lost(name, argument, door):
    if flows(name, argument):
        gradient_arrives(make(CALLS[name]), argument, door)
        return
    call = make(CALLS[name])
    given = {n: moved(x) for n, x in call.arrays.items()}
    given[argument] = given[argument].requires_grad_()
    torch._dynamo.reset()
    before = {n: x.detach().clone() for n, x in given.items()}
    with pytest.raises(Exception, match=rf"{argument}\.requires_grad = True") as raised:
        DOORS[door](call.function, {**given, **call.options})
    assert door == "compiled" or raised.type is ValueError
    if door == "torch":
        assert all(torch.equal(x.float().nan_to_num(), before[n].float().nan_to_num()) for n, x in given.items())
    given = {n: moved(x) for n, x in call.arrays.items()}
    with torch.no_grad():
        given[argument] = given[argument].requires_grad_()
        out, lse = DOORS[door](call.function, {**given, **call.options})
    assert not any(x.requires_grad for x in (out, lse) if x is not given[argument])


# What requires a gradient that it cannot get is refused as such. Where a tensor with a tangent requires one,
# torch.compile itself fails, by an assertion of torch's.
TANGENTS = [(*g, False) for g in GRADIENTS]
TANGENTS += [(*g, True) for g in GRADIENTS if flows(*g[:2]) and g[2] != "compiled"]


@pytest.mark.parametrize(("name", "argument", "door", "requires_grad"), TANGENTS)
def test_no_tangent_is_lost(name, argument, door, requires_grad):
    call = make(CALLS[name])
    given = {n: moved(x) for n, x in call.arrays.items()}
    torch._dynamo.reset()
    with forward_ad.dual_level():
        primal = given[argument].clone().requires_grad_(requires_grad)
        dual = {**given, argument: forward_ad.make_dual(primal, torch.ones_like(primal))}
        before = {n: x.detach().clone() for n, x in dual.items()}
        with pytest.raises(NotImplementedError, match=rf"{argument} = tensor with a tangent"):
            DOORS[door](call.function, {**dual, **call.options})
        if door == "torch":
            assert all(torch.equal(x.float().nan_to_num(), before[n].float().nan_to_num()) for n, x in dual.items())
        DOORS[door](call.function, {**given, **call.options})  # none has a tangent


@pytest.mark.parametrize("door", ["torch", "operator"])
def test_jvp_is_refused(door):
    call = make(CALLS["dense"])
    given = {n: moved(x) for n, x in call.arrays.items()}
    rows = [given.pop(n) for n in ("q", "k", "v")]
    function = lambda *rows: DOORS[door](call.function, {**dict(zip("qkv", rows)), **given, **call.options})  # noqa: E731
    ones = tuple(map(torch.ones_like, rows))
    with pytest.raises(NotImplementedError, match="q = tensor with a tangent"):
        torch.func.jvp(function, tuple(rows), ones)
    gradient = torch.func.grad(lambda *rows: function(*rows)[0].square().sum())
    with pytest.raises(NotImplementedError, match=r"tensor with a tangent|double backward"):
        torch.func.jvp(gradient, tuple(rows), ones)


@pytest.mark.parametrize("place", ["query", "key", "value", "captured"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_tangent_is_lost_in_flex_attention(place, requires_grad):
    tensors = {n: torch.randn(1, 2, 5, 16) for n in ("query", "key", "value")} | {"captured": torch.randn(2)}
    word = "captured tensor" if place == "captured" else place

    def call(tensors):
        slopes = tensors["captured"]
        score_mod = lambda score, b, h, i, j: score + slopes[h] * (i - j)  # noqa: E731
        return flashspark.flex_attention(*[tensors[n] for n in ("query", "key", "value")], score_mod)

    plain = call(tensors)
    with forward_ad.dual_level():
        primal = tensors[place].clone().requires_grad_(requires_grad)
        with pytest.raises(NotImplementedError, match=rf"{word} = tensor with a tangent"):
            call(tensors | {place: forward_ad.make_dual(primal, torch.ones_like(primal))})
        assert torch.equal(call(tensors), plain)


def test_no_tangent_is_lost_in_a_backward_pass():
    q, k, v = (torch.randn(1, 5, 2, 16) for _ in range(3))
    out, lse = flashspark.flash_attn_func(q, k, v, return_lse=True)
    with forward_ad.dual_level():
        dout = forward_ad.make_dual(torch.randn_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="dout = tensor with a tangent"):
            flashspark.flash_attn_backward(dout, q, k, v, out, lse)
        x = q.clone().requires_grad_()
        result = flashspark.flash_attn_func(x, k, v)
        with pytest.raises(NotImplementedError, match="tensor with a tangent"):
            torch.autograd.grad(result, x, dout)


def gradient_arrives(call, argument, door):
    """That of out alone, of lse alone, and of both: the sum."""
    found = []
    for used in ([0], [1], [0, 1]):
        given = {n: moved(x) for n, x in call.arrays.items()}
        given[argument].requires_grad_()
        torch._dynamo.reset()
        results = DOORS[door](call.function, {**given, **call.options})
        sum(results[i].square().sum() for i in used).backward()
        assert all(x.grad is None for n, x in given.items() if n != argument)
        found.append(given[argument].grad)
    assert found[0].abs().max() > 0 and (argument == "v" or found[1].abs().max() > 0)
    torch.testing.assert_close(found[0] + found[1], found[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("argument", ["q", "k", "v", "alibi_slopes", "sinks", "out"])
def test_no_gradient_is_lost_in_vllm(argument):
    from flashspark.vllm import attention

    row = test_doors.attention(replace(CALLS["varlen"], given=1))
    renamed = {"sinks": "s_aux"}
    given = {renamed.get(n, n): moved(x) for n, x in row.arrays.items()}
    given[renamed.get(argument, argument)].requires_grad_()
    options = {n: x for n, x in row.options.items() if n != "deterministic"}
    with pytest.raises(ValueError, match=r"requires_grad = True"):
        attention.varlen(test_doors.stock)(**given, **options, fa_version=4)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["dense given", "varlen given", "cache", "cache paged"])
def test_versions_count_up(name, door):
    """The version of a written tensor increases; that of a tensor only read does not."""
    call = make(CALLS[name])
    given = {n: moved(x) for n, x in call.arrays.items()}
    versions = {n: x._version for n, x in given.items()}
    torch._dynamo.reset()
    DOORS[door](call.function, {**given, **call.options})
    written = {"out", "lse"} | ({"k_cache", "v_cache"} if call.caches else set())
    for n, x in given.items():
        assert (x._version > versions[n]) == (n in written), f"{n}: {versions[n]}, then {x._version}"


@pytest.mark.parametrize("door", DOORS)
def test_versions_of_append(door):
    k = torch.ones(1, 2, 1, 16)
    given = {"k": k, "v": k.clone(), "k_cache": torch.zeros(1, 4, 1, 16), "v_cache": torch.zeros(1, 4, 1, 16)}
    given |= {"q": torch.ones(1, 2, 2, 16), "rotary_cos": torch.zeros(4, 8), "rotary_sin": torch.ones(4, 8)}
    given["cache_seqlens"] = torch.ones(1, dtype=torch.int32)
    versions = {n: x._version for n, x in given.items()}
    torch._dynamo.reset()
    DOORS[door]("append_kv", given)
    changed = {n for n, x in given.items() if x._version > versions[n]}
    assert changed == {"q", "k_cache", "v_cache"}


def test_a_backward_pass_finds_out():
    """torch reports a saved tensor that was the out= of a later call with its own error."""
    q = torch.randn(1, 2, 2, 16)
    weight = torch.randn(1, 2, 2, 16, requires_grad=True)
    saved = torch.empty_like(q)
    result = (weight * saved).sum()
    with torch.no_grad():
        flashspark.flash_attn_func(q, q, q, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("argument", ["q", "k", "v", "alibi_slopes", "sinks"])
def test_negated_views(argument, door):
    call = make(replace(SMALL, given=0))
    given = {n: moved(x) for n, x in call.arrays.items()}
    want = getattr(flashspark, call.function)(**given, **call.options)[0]
    given[argument] = torch._neg_view(-given[argument])
    torch._dynamo.reset()
    np.testing.assert_array_equal(back(DOORS[door](call.function, {**given, **call.options})[0]), back(want))
    given[argument] = torch.complex(torch.zeros_like(given[argument]), -given[argument]).conj().imag
    np.testing.assert_array_equal(back(DOORS[door](call.function, {**given, **call.options})[0]), back(want))


@pytest.mark.parametrize("door", ["torch", "operator"])
def test_results_into_negated_views(door):
    """The call is refused, or the tensor's values are the result."""
    call = make(replace(SMALL, given=0))
    given = {n: moved(x) for n, x in call.arrays.items()}
    want = getattr(flashspark, call.function)(**given, **call.options)[0]
    out = torch._neg_view(torch.zeros_like(want))
    try:
        DOORS[door](call.function, {**given, **call.options, "out": out})
    except (ValueError, TypeError) as error:
        assert "out" in str(error)  # noqa: PT017 - either is right
    else:
        np.testing.assert_array_equal(back(out.resolve_neg()), back(want))


def test_inference_mode():
    """Tensors of inference mode have no version counter."""
    call = make(CALLS["dense given"])
    with torch.inference_mode():
        given = {n: moved(x) for n, x in call.arrays.items()}
        out, _ = flashspark.flash_attn_func(**given, **call.options)
    assert out is given["out"]
