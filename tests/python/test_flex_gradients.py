"""Gradients of flex_attention and of functions in FlashAttention 4's form: q, k, v and what the functions capture,
against float64. Skipped without torch."""

from __future__ import annotations

import math

import flashspark
import pytest
from flashspark import create_block_mask, flex_attention

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("torch.nn.attention.flex_attention")

from gradient_reference import DTYPES, assert_within, weighted  # noqa: E402 - it needs torch

F = torch.nn.functional
B, H, HKV, Q, K, D = 2, 4, 2, 45, 61, 32
GENERATOR = torch.Generator().manual_seed(17)
DOCS = torch.randint(0, 4, (64,), generator=GENERATOR).sort().values


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


# A function of captured tensors that gives a score function, and these tensors.
SCORES = {
    "none": (None, ()),
    "alibi": (lambda slopes: lambda s, b, h, q, k: s - slopes[h] * (q - k).abs(), (random(H).abs() / 8,)),
    "softcap": (lambda cap: lambda s, b, h, q, k: cap * torch.tanh(s / cap), (torch.tensor(2.5),)),
    "softcap by a number": (lambda: lambda s, b, h, q, k: 3.0 * torch.tanh(s / 3.0), ()),
    "bias of 4 dimensions": (lambda t: lambda s, b, h, q, k: s + t[b, h, q, k], (random(B, H, Q, K),)),
    "relative bias": (
        lambda t, w: lambda s, b, h, q, k: s + w[h] * t[h, torch.clamp(q - k, -16, 15) + 16],
        (random(H, 32), random(H)),
    ),
    "one tensor twice": (lambda t: lambda s, b, h, q, k: s + t[q] * t[k], (random(64),)),
    "products": (lambda t, u: lambda s, b, h, q, k: s * t[k] + torch.sin(u[h, q]) * s, (random(K), random(H, Q))),
    "functions": (
        lambda t: lambda s, b, h, q, k: torch.sigmoid(s) * t[h] + F.silu(s) + torch.erf(s) + torch.rsqrt(s * s + 1),
        (random(H),),
    ),
    "where": (
        lambda t: lambda s, b, h, q, k: torch.where((q + k) % 3 == 0, s * t[0], s.clamp(max=1.0) - t[1]),
        (random(2),),
    ),
    "masked fill": (lambda t: lambda s, b, h, q, k: (s + t[k]).masked_fill((q + k) % 5 == 0, -math.inf), (random(K),)),
}
MASKS = {
    "none": None,
    "causal": lambda b, h, q, k: q >= k,
    "sliding": lambda b, h, q, k: (q >= k) & (q - k <= 9),
    "documents": lambda b, h, q, k: DOCS[q] == DOCS[k],
    "heads": lambda b, h, q, k: (q - k) * (h + 1) < 40 * (b + 1),
    "nothing for some": lambda b, h, q, k: q % 3 != 0,
}


def qkv(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, Q, D), (B, HKV, K, D), (B, HKV, K, D)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def formula(tensors, score, mask_mod):
    """flex_attention in the tensors' type."""
    q, k, v = tensors
    k, v = (x.repeat_interleave(H // HKV, 1) for x in (k, v))
    at = [torch.arange(n).view(shape) for n, shape in ((B, (B, 1, 1, 1)), (H, (H, 1, 1)), (Q, (Q, 1)), (K, (K,)))]
    s = (q / math.sqrt(D)) @ k.transpose(-1, -2)
    if score is not None:
        s = score(s, *at).to(q.dtype)
    if mask_mod is not None:
        s = s.masked_fill(~mask_mod(*at), -math.inf)
    empty = (s == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    lse = torch.logsumexp(s.masked_fill(empty, 0), -1).masked_fill(empty[..., 0], -math.inf)
    return p @ v, lse


def leaves(values, dtype):
    return [x.detach().to(dtype).requires_grad_() for x in values]


def references(make, captured, tensors, mask_mod, dtype, want_lse):
    found = []
    for kind in (torch.float64, dtype):
        given, held = leaves(tensors, kind), leaves(captured, kind)
        out, lse = formula(given, make(*held) if make else None, mask_mod)
        weighted(out, lse if want_lse else None).backward()
        found.append([x.grad for x in (*given, *held)])
    return found


def check(call, make, captured, mask_mod, dtype, want_lse=False, captured_dtype=None):
    """call(q, k, v, score function) gives (out, lse)."""
    tensors = qkv(dtype)
    kept = [x.to(captured_dtype or dtype) for x in captured]
    want, narrow = references(make, kept, tensors, mask_mod, dtype, want_lse)
    given, held = leaves(tensors, dtype), leaves(kept, captured_dtype or dtype)
    out, lse = call(*given, make(*held) if make else None)
    weighted(out, lse if want_lse else None).backward()
    names = ["q", "k", "v", *(f"captured {i}" for i in range(len(held)))]
    for name, x, exact, other in zip(names, (*given, *held), want, narrow, strict=True):
        assert x.grad.dtype == x.dtype
        assert_within(x.grad, exact, other, name)


def block_mask(name):
    return None if MASKS[name] is None else create_block_mask(MASKS[name], B, H, Q, K, device="cpu", BLOCK_SIZE=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_score_functions(name, dtype):
    make, captured = SCORES[name]
    kind = list(MASKS)[len(name) % len(MASKS)]
    mask = block_mask(kind)
    call = lambda q, k, v, score: flex_attention(q, k, v, score, mask, enable_gqa=True, return_lse=True)  # noqa: E731
    check(call, make, captured, MASKS[kind], dtype)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    make, captured = SCORES["relative bias"]
    for mask in (block_mask(name), theirs.create_block_mask(MASKS[name] or theirs.noop_mask, B, H, Q, K, device="cpu")):
        check(
            lambda q, k, v, score: flex_attention(q, k, v, score, mask, enable_gqa=True, return_lse=True),  # noqa: B023
            make, captured, MASKS[name], torch.float32, want_lse=True,
        )  # fmt: skip


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types_of_captured_tensors(kind):
    make, captured = SCORES["products"]
    call = lambda q, k, v, score: flex_attention(q, k, v, score, enable_gqa=True, return_lse=True)  # noqa: E731
    tensors = qkv()
    given, held = leaves(tensors, torch.float32), leaves(captured, kind)
    weighted(call(*given, make(*held))[0], None).backward()
    wide, exact = leaves(tensors, torch.float64), leaves([x.to(kind) for x in captured], torch.float64)
    weighted(formula(wide, make(*exact), None)[0], None).backward()
    for x, want in zip(held, exact):
        assert x.grad.dtype == kind
        tolerance = {torch.float64: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[kind]
        assert (x.grad.double() - want.grad).abs().max() <= tolerance * want.grad.abs().max()


def test_layouts_of_captured_tensors():
    """Transposed, sliced, expanded, and a parameter that a module holds."""
    base = random(K, H)
    row = random(1, K)

    class Bias(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(base.clone())
            self.rows = torch.nn.ParameterList([torch.nn.Parameter(row.clone())])

        def forward(self, s, b, h, q, k):
            return s + self.table.t()[h, k] + self.rows[0].expand(H, K)[h, k]

    module = Bias()
    with pytest.raises(flashspark.TraceError):  # what is done to a tensor as a whole belongs outside
        flex_attention(*leaves(qkv(), torch.float32), module, enable_gqa=True)
    turned, wide = base.clone().requires_grad_(), row.clone().requires_grad_()
    table, rows = turned.t(), wide.expand(H, K)
    score = lambda s, b, h, q, k: s + table[h, k] + rows[h, k]  # noqa: E731
    weighted(flex_attention(*qkv(), score, enable_gqa=True), None).backward()
    a, b = base.double().requires_grad_(), row.double().requires_grad_()
    table, rows = a.t(), b.expand(H, K)
    weighted(formula([x.double() for x in qkv()], score, None)[0], None).backward()
    torch.testing.assert_close(turned.grad.double(), a.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


class Table(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(random(H, 32))

    def forward(self, s, b, h, q, k):
        return s + self.table[h, torch.clamp(q - k, -16, 15) + 16]


def test_a_module_trains():
    """Steps of gradient descent on a module's table, whose values change in place between the calls."""
    module, optimised = Table(), None
    optimised = torch.optim.SGD(module.parameters(), lr=2e-3)
    other = Table()
    other.load_state_dict(module.state_dict())
    other_optimised = torch.optim.SGD(other.parameters(), lr=2e-3)
    mask, losses = block_mask("causal"), []
    for _ in range(4):
        for function, steps, m in (("ours", optimised, module), ("formula", other_optimised, other)):
            steps.zero_grad()
            q, k, v = qkv()
            if function == "ours":
                out = flex_attention(q, k, v, m, mask, enable_gqa=True)
            else:
                out, _ = formula((q, k, v), m, MASKS["causal"])
            loss = out.square().sum()
            loss.backward()
            steps.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.testing.assert_close(module.table, other.table, rtol=1e-4, atol=1e-4)


def test_inference_after_training_and_back():
    """The fast path of inference does not answer a call that needs gradients, nor the other way round."""
    module = Table()
    q, k, v = qkv()
    for _ in range(2):
        with torch.no_grad():
            quiet = flex_attention(q, k, v, module, enable_gqa=True)
            assert not quiet.requires_grad
        out = flex_attention(q, k, v, module, enable_gqa=True)
        assert out.requires_grad and torch.equal(out, quiet)
        frozen = flex_attention(q.clone().requires_grad_(), k, v, module, enable_gqa=True)
        assert frozen.requires_grad


def score_fa4(s, b, h, q, k, info, aux):
    return s + aux[0][h, torch.clamp(q - k, -16, 15) + 16] * aux[1][q]


def mask_fa4(b, h, q, k, info, aux):
    return aux[2][q] == aux[2][k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("door", ["flash_attn_func", "interface"])
def test_flash_attention_4s_form(dtype, door):
    from flashspark import interface

    captured = (random(H, 32), random(64))
    function = flashspark.flash_attn_func if door == "flash_attn_func" else interface.flash_attn_func

    def make(table, rows):
        return lambda s, b, h, q, k: s + table[h, torch.clamp(q - k, -16, 15) + 16] * rows[q]

    tensors, kept = qkv(dtype), [x.to(dtype) for x in captured]
    want, narrow = references(make, kept, tensors, MASKS["documents"], dtype, True)
    for _ in range(2):  # the second call knows the functions
        given, held = leaves(tensors, dtype), leaves(kept, dtype)
        out, lse = function(
            *(x.transpose(1, 2) for x in given), score_mod=score_fa4, mask_mod=mask_fa4,
            aux_tensors=[*held, DOCS.to(torch.int32)], return_lse=True,
        )  # fmt: skip
        weighted(out.transpose(1, 2), lse).backward()
        for i, (x, exact, other) in enumerate(zip((*given, *held), want, narrow)):
            assert_within(x.grad, exact, other, str(i))


def test_flash_attention_4s_form_varlen():
    table = random(H, 32).requires_grad_()
    q, k, v = (x.requires_grad_() for x in (random(30, H, D), random(30, HKV, D), random(30, HKV, D)))
    cu = torch.tensor([0, 11, 30], dtype=torch.int32)

    def score(s, b, h, q, k, info, aux):
        return s + aux[0][h, torch.clamp(q - k, -16, 15) + 16]

    out = flashspark.flash_attn_varlen_func(q, k, v, cu, cu, 19, 19, score_mod=score, aux_tensors=[table])
    weighted(out, None).backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, table)]
    from gradient_reference import attend

    parts = []
    for a, b in ((0, 11), (11, 30)):
        bias = lambda s, h, i, j: s + wide[3][h, torch.clamp(i - j, -16, 15) + 16]  # noqa: E731
        parts.append(attend(wide[0][a:b], wide[1][a:b], wide[2][a:b], score=bias)[0])
    weighted(torch.cat(parts), None).backward()
    for x, want in zip((q, k, v, table), wide):
        torch.testing.assert_close(x.grad.double(), want.grad, rtol=1e-4, atol=1e-4)


def test_checkpoint_and_func_grad():
    table = random(H, 32)
    tensors = qkv()

    def loss(table, q):
        score = lambda s, b, h, i, j: s + table[h, torch.clamp(i - j, -16, 15) + 16]  # noqa: E731
        return weighted(flex_attention(q, *tensors[1:], score, enable_gqa=True), None)

    given = leaves((table, tensors[0]), torch.float32)
    loss(*given).backward()
    want = [x.grad for x in given]
    again = leaves((table, tensors[0]), torch.float32)
    torch.utils.checkpoint.checkpoint(loss, *again, use_reentrant=False).backward()
    assert all(torch.equal(a.grad, b) for a, b in zip(again, want))
    for got, b in zip(torch.func.grad(loss, argnums=(0, 1))(table, tensors[0]), want):
        assert torch.equal(got, b)


def test_double_backward_is_refused():
    q, k, v = leaves(qkv(), torch.float32)
    (first,) = torch.autograd.grad(flex_attention(q, k, v, enable_gqa=True).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        first.sum().backward()


def test_detach_inside_a_function_is_refused():
    """The graph has no such operation: the gradient would flow where the function says that it does not."""
    table = random(H, K).requires_grad_()
    for score in (
        lambda s, b, h, q, k: s + s.detach() * 0.1,
        lambda s, b, h, q, k: s + (table[h, k] * 2).detach(),
    ):
        with pytest.raises(NotImplementedError, match=r"detach"):
            flex_attention(*leaves(qkv(), torch.float32), score, enable_gqa=True)
        with torch.no_grad():
            assert flex_attention(*qkv(), score, enable_gqa=True).isfinite().all()
    outside = table.detach()
    q, k, v = leaves(qkv(), torch.float32)
    flex_attention(q, k, v, lambda s, b, h, i, j: s + outside[h, j], enable_gqa=True).sum().backward()
    assert table.grad is None and q.grad is not None


def test_mask_functions_have_no_gradient():
    """A tensor that decides which keys are kept has none, as in torch."""
    limits = random(K).requires_grad_()
    q, k, v = leaves(qkv(), torch.float32)
    mask = create_block_mask(lambda b, h, i, j: limits[j] > 0, None, None, Q, K, device="cpu", BLOCK_SIZE=16)
    flex_attention(q, k, v, block_mask=mask, enable_gqa=True).sum().backward()
    assert limits.grad is None and q.grad.abs().max() > 0
