"""What torch does with gradients beyond backward(): checkpoints, torch.compile, AMP, torch.func, generators. Skipped
without torch."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from functools import partial

import flashspark
import pytest

torch = pytest.importorskip("torch")

from gradient_reference import weighted  # noqa: E402 - it needs torch
from torch.utils.checkpoint import checkpoint  # noqa: E402


def tensors(dtype=torch.float32, rows=24, keys=24, heads=(4, 2), width=32, seed=2, grad=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, rows, heads[0], width), (2, keys, heads[1], width), (2, keys, heads[1], width)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad) for shape in shapes]


def operators():
    from flashspark import torch_ops

    return torch_ops


def gradients(function, *given):
    given = [x.detach().clone().requires_grad_() for x in given]
    weighted(function(*given), None).backward()
    return [x.grad for x in given]


def same(got, want, tolerance=0.0):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def block(q, k, v):
    """Arithmetic around a call, so that there is something to recompute."""
    return flashspark.flash_attn_func(q * 1.5, k.sin(), v, causal=True, window_size=(9, 0)) * 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpoint(reentrant, dropout):
    def run(q, k, v):
        return flashspark.flash_attn_func(q * 1.5, k, v, dropout, causal=True) * 2

    torch.manual_seed(3)
    want = gradients(run, *tensors())
    torch.manual_seed(3)
    same(gradients(lambda *x: checkpoint(run, *x, use_reentrant=reentrant), *tensors()), want)


def test_checkpoint_keeps_nothing():
    """Between the passes no tensor of the call is alive but those that the checkpoint was given."""
    kept = []

    def run(q, k, v):
        scaled = q * 1.5
        kept.append(weakref.ref(scaled))
        return flashspark.flash_attn_func(scaled, k, v, causal=True)

    out = checkpoint(run, *tensors(), use_reentrant=False)
    gc.collect()
    assert kept[0]() is None
    out.sum().backward()
    assert len(kept) == 2


def test_nothing_is_kept_after_backward():
    q, k, v = tensors()
    out = flashspark.flash_attn_func(q * 1, k, v)
    alive = weakref.ref(out.grad_fn)
    out.sum().backward()
    del out
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("call", ["func", "varlen", "lse", "dropout", "biases"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_keeps_one_graph(call, backend):
    ops = operators()
    cu = torch.tensor([0, 10, 24], dtype=torch.int32)
    slopes, sinks = torch.rand(4), torch.randn(4)

    def run(q, k, v):
        q = q * 1.5
        if call == "varlen":
            return ops.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 14, 14, causal=True).sin()
        if call == "lse":
            out, lse = ops.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
            return out * lse.transpose(1, 2)[..., None].sigmoid()
        if call == "dropout":
            return ops.flash_attn_func(q, k, v, 0.3, rng_state=(5, 6)).sin()
        if call == "biases":
            return ops.flash_attn_func(q, k, v, alibi_slopes=slopes, sinks=sinks.to(q.dtype), softcap=4.0).sin()
        return ops.flash_attn_func(q, k, v, causal=True, window_size=(9, 0)).sin()

    want = gradients(run, *tensors())
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    same(gradients(compiled, *tensors()), want, 1e-6)


def test_compile_with_other_lengths():
    """Dynamic shapes: one graph for several lengths."""
    ops = operators()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: ops.flash_attn_func(q * 2, k, v, causal=True), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows in (24, 17, 40):
        given = tensors(rows=rows, keys=rows)
        want = gradients(lambda q, k, v: flashspark.flash_attn_func(q * 2, k, v, causal=True), *given)
        same(gradients(compiled, *given), want, 1e-6)


def test_operators_are_well_formed():
    ops = operators()
    q, k, v = tensors(width=20)
    head, tail = (None, True, -1, -1, 0.0, 0, False, None, 0), list(ops.NO_TAIL)
    tail[ops.in_tail("sinks")] = torch.randn(4, requires_grad=True)
    torch.library.opcheck(torch.ops.flashspark.attention.default, (q, k, v, *head, *tail, True))
    plain = [x.detach() for x in (q, k, v)]
    tail[ops.in_tail("sinks")] = tail[ops.in_tail("sinks")].detach()
    out, lse = torch.ops.flashspark.attention(*plain, *head, *tail, True)
    for wanted in ([True] * 4 + [False] * 2, [False, True, False, False, False, False]):
        torch.library.opcheck(
            torch.ops.flashspark.attention_backward.default,
            (torch.randn_like(out), None, out, lse, *plain, *head, *tail, wanted),
        )


def test_operators_equal_the_functions():
    ops = operators()
    for options in ({}, {"causal": True, "window_size": (5, None)}, {"softcap": 2.0, "deterministic": True}):
        want = gradients(partial(flashspark.flash_attn_func, **options), *tensors())
        same(gradients(partial(ops.flash_attn_func, **options), *tensors()), want)
    qkv = torch.randn(2, 24, 3, 4, 32)
    want = gradients(lambda x: flashspark.flash_attn_qkvpacked_func(x, causal=True), qkv)
    same(gradients(lambda x: ops.flash_attn_qkvpacked_func(x, causal=True), qkv), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Layers that autocast runs in a narrow type, with weights in float32, beside torch's own attention."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))
    x = torch.randn(2, 24, 64)

    def step(attention):
        layers.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            q, k, v = (layer(x).view(2, 24, 4, 16) for layer in layers[:3])
            assert q.dtype == dtype
            out = layers[3](attention(q, k, v).flatten(2))
        out.float().square().mean().backward()
        return [p.grad.clone() for p in layers.parameters()]

    def theirs(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    got = step(lambda q, k, v: flashspark.flash_attn_func(q, k, v, causal=True))
    for a, b in zip(got, step(theirs)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-3)


@pytest.mark.parametrize("door", ["function", "operator"])
def test_torch_func_grad(door):
    function = flashspark.flash_attn_func if door == "function" else operators().flash_attn_func
    q, k, v = tensors(grad=False)

    def loss(q, k, v):
        out, lse = function(q, k, v, causal=True, return_softmax_lse=True)
        return weighted(out, lse)

    want = []
    for place in range(3):
        given = [x.clone() for x in (q, k, v)]
        given[place].requires_grad_()
        loss(*given).backward()
        want.append(given[place].grad)
    same(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), want)
    same(torch.func.grad(loss, argnums=(1,))(q, k, v), want[1:2])  # the others are not wrapped
    value, pullback = torch.func.vjp(loss, q, k, v)
    same(pullback(torch.ones_like(value)), want)


def test_torch_func_functional_call():
    """Gradients of a module's parameters, one of which its attention captures."""
    model = torch.nn.ParameterDict({"q": torch.randn(1, 8, 2, 16), "sinks": torch.randn(2)})
    k, v = torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)

    def loss(parameters):
        return flashspark.flash_attn_func(parameters["q"], k, v, sinks=parameters["sinks"]).square().sum()

    parameters = {name: x.detach() for name, x in model.items()}
    got = torch.func.grad(loss)(parameters)
    loss(dict(model)).backward()
    same([got[name] for name in model], [x.grad for x in model.values()])


@pytest.mark.parametrize("door", ["function", "operator"])
def test_vmap_is_refused(door):
    function = flashspark.flash_attn_func if door == "function" else operators().flash_attn_func
    q, k, v = (x.detach()[None] for x in tensors())
    if door == "function":
        with pytest.raises(TypeError, match=r"q = tensor inside torch\.func"):
            torch.func.vmap(function)(q, k, v)
    with pytest.raises(Exception, match="vmap"):
        torch.func.vmap(torch.func.grad(lambda q, k, v: function(q, k, v).sum()))(q, k, v)


@pytest.mark.parametrize("door", ["function", "operator"])
def test_double_backward_is_refused(door):
    function = flashspark.flash_attn_func if door == "function" else operators().flash_attn_func
    q, k, v = tensors()
    out = function(q, k, v, causal=True)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (plain,) = torch.autograd.grad(function(q, k, v, causal=True).square().sum(), q)
    assert torch.equal(first, plain)  # to ask for the graph is no error yet
    with pytest.raises(NotImplementedError, match="double backward"):
        first.square().sum().backward()
    loss = lambda q: function(q, k.detach(), v.detach(), causal=True).square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).square().sum())(q.detach())


def asked_about(monkeypatch, answer=None):
    """What the calls that follow ask about their backward pass; `answer` is what they are told."""
    from flashspark import _autograd

    asked, real = [], _autograd.gradients

    def gradients(forward, dout, dlse, wanted, explain=False):
        if explain:
            asked.append(wanted)
            if answer is not None:
                return answer
        return real(forward, dout, dlse, wanted, explain)

    monkeypatch.setattr(_autograd, "gradients", gradients)
    monkeypatch.setattr(_autograd, "_supported", set())
    return asked


@pytest.mark.parametrize("door", ["function", "operator"])
def test_a_call_without_a_backward_pass_is_refused_at_once(door, monkeypatch):
    function = flashspark.flash_attn_func if door == "function" else operators().flash_attn_func
    given = dict(zip("qkv", tensors(grad=False)), alibi_slopes=torch.rand(4))
    out = function(**given, causal=True)
    asked = asked_about(monkeypatch, "cuda: lacks something\nno implementation fits\n")
    for n, (name, x) in enumerate(given.items()):
        x.requires_grad_()
        with pytest.raises(
            NotImplementedError,
            match=rf"^{name}\.requires_grad = True: .*: no implementation fits\ncuda: lacks something",
        ):
            function(**given, causal=True)
        with torch.no_grad():
            assert torch.equal(function(**given, causal=True), out)
        assert len(asked) == n + 1 and not any(asked[n][:3]) and asked[n][5] == (name == "alibi_slopes")
        x.requires_grad_(False)


@pytest.mark.parametrize("door", ["function", "operator"])
def test_calls_that_differ_in_sizes_are_asked_about_once(door, monkeypatch):
    function = flashspark.flash_attn_func if door == "function" else operators().flash_attn_func
    asked = asked_about(monkeypatch)
    function(*tensors(grad=False))
    assert asked == []
    for rows in (24, 1, 70):
        function(*tensors(rows=rows, keys=2 * rows)).sum().backward()
    assert len(asked) == 1
    changed = [{"causal": True}, {"softcap": 3.0}, {"deterministic": True}, {"alibi_slopes": torch.rand(4)}]
    for n, options in enumerate(changed):
        for _ in range(2):
            function(*tensors(), **options)
        assert len(asked) == n + 2
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    function(*tensors())
    function(*tensors(width=64))
    assert len(asked) == len(changed) + 3


def test_dropout_follows_torchs_generator():
    def run(*given):
        return flashspark.flash_attn_func(*given, dropout_p=0.4)

    torch.manual_seed(1)
    first, second = gradients(run, *tensors()), gradients(run, *tensors())
    torch.manual_seed(1)
    same(gradients(run, *tensors()), first)
    assert not torch.equal(first[0], second[0])
    # The backward pass drops what the forward pass dropped: a key that no query keeps has no gradient in v.
    q, k, v = tensors(rows=1, keys=40, heads=(1, 1))
    out, _, dropped = flashspark.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    out.sum().backward()
    assert torch.equal((v.grad != 0).all(-1)[..., 0], (dropped >= 0)[:, 0, 0])
    assert 0 < (dropped < 0).sum() < dropped.numel() and not dropped.requires_grad


def test_changes_between_the_passes_are_found():
    """torch's own error, for every tensor that the backward pass reads."""
    cu = torch.tensor([0, 10, 24], dtype=torch.int32)
    state = torch.tensor([3, 4])
    for name in ("q", "cu", "state", "sinks"):
        q, k, v = (x[0] for x in tensors())
        inner, sinks, lengths, numbers = q * 1, torch.randn(4), cu.clone(), state.clone()
        out = flashspark.flash_attn_varlen_func(
            inner, k, v, lengths, lengths, 14, 14, dropout_p=0.2, rng_state=numbers, sinks=sinks
        )
        with torch.no_grad():
            {"q": inner, "cu": lengths, "state": numbers, "sinks": sinks}[name].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_two_backward_passes():
    q, k, v = tensors()
    out = flashspark.flash_attn_func(q, k, v)
    out.sum().backward(retain_graph=True)
    first = q.grad.clone()
    out.sum().backward()
    assert torch.equal(q.grad, 2 * first)


def test_no_grad_and_inference_mode():
    q, k, v = tensors()
    with torch.no_grad():
        assert not flashspark.flash_attn_func(q, k, v).requires_grad
    with torch.inference_mode():
        assert not flashspark.flash_attn_func(q, k, v).requires_grad
    assert not flashspark.flash_attn_func(q.detach(), k.detach(), v.detach()).requires_grad


def test_explain_of_a_call_with_gradients():
    q, k, v = tensors()
    text = flashspark.attention_explain(flashspark.flash_attn_func, q, k, v, causal=True)
    assert "cpu-engine" in text


def test_parameters_train():
    """Some steps of gradient descent reach what one head's attention over fixed keys can reach."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 12, 1, 16, generator=generator) for _ in range(2))
    target = v[:, [3, 7]]
    q = torch.nn.Parameter(torch.zeros(1, 2, 1, 16))
    optimiser = torch.optim.Adam([q], lr=0.5)
    for _ in range(60):
        optimiser.zero_grad()
        loss = (flashspark.flash_attn_func(q, k, v) - target).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 1e-2


OVERHEAD = """
import sys
import flashspark, torch
q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
learned = q.clone().requires_grad_()
def count(call):
    call()
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    call()
    sys.setprofile(None)
    return calls
plain = count(lambda: flashspark.flash_attn_func(q, k, v, causal=True))
with torch.no_grad():
    quiet = count(lambda: flashspark.flash_attn_func(learned, k, v, causal=True))
assert plain == ["<lambda>", "flash_attn_func", "rare_options", "attend"], plain
assert quiet == plain, (quiet, plain)
score = lambda s, b, h, q, k: s * 1.5
flex = count(lambda: flashspark.flex_attention(q, k, v, score))
assert not any("grad" in name for name in flex), flex
for name in ("_autograd", "_backward", "torch_ops"):
    assert "flashspark." + name not in sys.modules, name
learned = q.clone().requires_grad_()
flashspark.flash_attn_func(learned, k, v).sum().backward()
assert "flashspark._autograd" in sys.modules and "flashspark.torch_ops" not in sys.modules
"""


def test_calls_without_gradients_do_no_more_than_before():
    """They load none of the modules for gradients, and run no function of Python but the two of every call."""
    subprocess.run([sys.executable, "-P", "-c", OVERHEAD], check=True)
