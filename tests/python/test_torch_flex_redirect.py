"""torch's flex_attention sent to flashspark, eagerly and under torch.compile. Skipped without torch."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from flashspark import flex
from flashspark.flex import redirect_torch_flex_attention
from flex_reference import check, kept_by

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("torch.nn.attention.flex_attention")
torch_flex = pytest.importorskip("flashspark._torch_flex_ops")

from torch_arrays import back  # noqa: E402 - it needs torch

before = theirs.flex_attention  # as a model has it that imported it earlier

B, H, KV, S, D = 2, 4, 2, 40, 16
generator = torch.Generator().manual_seed(5)
SLOPES = torch.rand(H, generator=generator)
BIAS = torch.randn(H, S, generator=generator)
DOCS = torch.randint(0, 3, (S,), generator=generator).sort().values


def alibi(score, b, h, q, k):
    return torch.tanh(score) + SLOPES[h] * (k - q) / 8


def many(score, b, h, q, k):
    wide = torch.where((q >= k) & (k % 3 != 0) | (b == 1), score * 1.5, BIAS[h, k].sin())
    return wide.clamp(min=-4.0) + torch.sigmoid(score) * torch.exp(-torch.abs(q - k).float()) + (q // 4 - k) * 0.01


def documents(b, h, q, k):
    return (DOCS[q] == DOCS[k]) & (q >= k)


def on_numpy(function):
    return lambda *args: torch.as_tensor(function(*map(torch.as_tensor, args))).numpy()


@pytest.fixture
def calls(monkeypatch):
    """How often the operator and the package's function are called while torch's is redirected, and the operator's
    gradients."""
    count = {"operator": 0, "function": 0}
    attend, function = torch_flex.attend, flex.flex_attention

    def counted(name, original):
        def call(*args, **kwargs):
            count[name] = count.get(name, 0) + 1
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(torch_flex, "attend", counted("operator", attend))
    monkeypatch.setattr(torch_flex, "gradients", counted("gradients", torch_flex.gradients))
    monkeypatch.setattr(flex, "flex_attention", counted("function", function))
    torch._dynamo.reset()
    with redirect_torch_flex_attention(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield count
    torch._dynamo.reset()


@pytest.fixture
def qkv(normal):
    return [torch.from_numpy(normal(B, n, S, D)) for n in (H, KV, KV)]


def checked(out, tensors, score, lse=None):
    keep = kept_by(on_numpy(documents), B, H, S, S)
    check(back(out), *map(back, tensors), on_numpy(score), keep, lse=lse)


def mask_of(function=documents):
    return theirs.create_block_mask(function, None, None, S, S, device="cpu", BLOCK_SIZE=16)


def test_eagerly(calls, qkv):
    mask = mask_of()
    out, aux = theirs.flex_attention(*qkv, alibi, mask, enable_gqa=True, return_aux=theirs.AuxRequest(lse=True))
    checked(out, qkv, alibi, aux.lse.numpy())
    assert calls == {"operator": 0, "function": 1}
    out, lse = before(*qkv, alibi, mask, enable_gqa=True, return_lse=True)
    checked(out, qkv, alibi, lse.numpy())
    assert calls == {"operator": 1, "function": 1}


@pytest.mark.parametrize("score", [alibi, many])
@pytest.mark.parametrize("name", ["attribute", "imported before"])
def test_compiled(calls, qkv, name, score):
    """The graph has the operator, with whatever the arrays hold at the time."""
    graphs = []

    def backend(graph, examples):
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph)(graph, examples)

    def model(q, k, v, mask):
        function = theirs.flex_attention if name == "attribute" else before
        out, lse = function(q * 1.0, k, v, score, mask, enable_gqa=True, return_lse=True)
        return out + 0, lse

    compiled, mask = torch.compile(model, backend=backend, fullgraph=True), mask_of()
    with torch.no_grad():
        for _ in range(2):
            out, lse = compiled(*qkv, mask)
            checked(out, qkv, score, lse.numpy())
            SLOPES.mul_(0.5)
            BIAS.add_(0.25)
    assert calls == {"operator": 2, "function": 0} and len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes]
    assert torch.ops.flashspark.flex_attention.default in targets
    assert not any("higher_order" in str(target) for target in targets)


def test_compiled_without_functions(calls, qkv):
    model = torch.compile(lambda *x: theirs.flex_attention(*x, enable_gqa=True, scale=0.2), backend="aot_eager")
    with torch.no_grad():
        check(back(model(*qkv)), *map(back, qkv), scale=0.2)
    capped = lambda score, b, h, q, k: 2 * torch.tanh(score / 2)  # noqa: E731 - which is built in
    model = torch.compile(lambda *x: theirs.flex_attention(*x, capped, enable_gqa=True), backend="aot_eager")
    with torch.no_grad():
        check(back(model(*qkv)), *map(back, qkv), on_numpy(capped))
    assert calls["operator"] == 2


def learned(table, slopes):
    """A function whose captured tensors have gradients."""

    def score(s, b, h, q, k):
        return torch.tanh(s) * 2 + table[h, k] + slopes[h] * (k - q) / 8

    return score


def formula(q, k, v, score):
    """out and lse of the documents' mask in torch's own operations."""
    at = [torch.arange(n).view(shape) for n, shape in ((B, (B, 1, 1, 1)), (H, (H, 1, 1)), (S, (S, 1)), (S, (S,)))]
    k, v = (x.repeat_interleave(H // KV, 1) for x in (k, v))
    s = score(q @ k.transpose(-1, -2) * D**-0.5, *at).masked_fill(~documents(*at), -torch.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def gradients(function, tensors):
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, BIAS, SLOPES)]
    out, lse = function(*leaves)
    (out.square().sum() + lse.sin().sum()).backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("way", ["eager", "imported before", "aot_eager", "inductor"])
def test_gradients(calls, qkv, way):
    """Of q, k, v and of what the function captures: eagerly, and in one compiled graph. torch has no backward pass for
    the CPU."""
    mask = mask_of()
    function = theirs.flex_attention if way == "eager" else before

    def model(q, k, v, table, slopes):
        return function(q * 1.0, k, v, learned(table, slopes), mask, enable_gqa=True, return_lse=True)

    compiled = way in ("aot_eager", "inductor")
    run = torch.compile(model, backend=way, fullgraph=True) if compiled else model
    want = gradients(lambda q, k, v, table, slopes: formula(q, k, v, learned(table, slopes)), qkv)
    for _ in range(2):
        for got, expected in zip(gradients(run, qkv), want):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if way == "eager":
        assert calls == {"operator": 0, "function": 2}
    elif compiled:
        assert calls == {"operator": 2, "function": 0, "gradients": 2}


def test_gradients_of_a_captured_tensor_alone(calls, qkv):
    table = torch.rand(H, requires_grad=True)
    score = lambda s, b, h, q, k: s * table[h]  # noqa: E731
    model = torch.compile(lambda *x: theirs.flex_attention(*x, score, mask_of(), enable_gqa=True), backend="aot_eager")
    model(*qkv).square().sum().backward()
    wide = table.detach().double().requires_grad_()
    formula(*(x.double() for x in qkv), lambda s, b, h, q, k: s * wide[h])[0].square().sum().backward()
    torch.testing.assert_close(table.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not theirs.flex_attention(*qkv, score, enable_gqa=True).requires_grad


def test_what_is_left_to_torch(qkv):
    def unknown(score, b, h, q, k):
        return score + torch.lgamma(score.abs() + 1)

    want = before(*qkv, unknown, enable_gqa=True)
    with redirect_torch_flex_attention():
        with pytest.warns(RuntimeWarning, match=r"leaves a call of flex_attention to torch: .*lgamma"):
            got = theirs.flex_attention(*qkv, unknown, enable_gqa=True)
        double = [x.double() for x in qkv]
        with pytest.warns(RuntimeWarning, match=r"query\.dtype = torch\.float64"):
            assert theirs.flex_attention(*double, alibi, enable_gqa=True).dtype == torch.float64
    torch.testing.assert_close(got, want)


def test_nested_and_undone(qkv):
    first = redirect_torch_flex_attention()
    with redirect_torch_flex_attention():
        first.undo()
        assert theirs.flex_attention is not before
    first.undo()
    assert theirs.flex_attention is before and torch.ops.higher_order.flex_attention.cacheable()


def test_operator(qkv):
    text = "flashspark-graph 1\nscore\nconst f32 0x1p+1\nmul 0 1\nreturn 2\n"
    rest = (text, [], "", [], None, None, None, None, 0, 0, 0.25, 0.0, None)
    operator = torch.ops.flashspark.flex_attention.default
    out, lse, _ = operator(*qkv, *rest)
    check(back(out), *map(back, qkv), lambda s, *_: s * 2, scale=0.25, lse=(lse * np.log(2)).numpy())
    meta = operator(*(x.to("meta") for x in qkv), *rest)
    assert meta[0].shape == out.shape and meta[1].shape == lse.shape
    torch.library.opcheck(operator, (*qkv, *rest), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(operator, (qkv[0].clone().requires_grad_(), *qkv[1:], *rest))
