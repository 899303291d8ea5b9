"""Tracing functions that use torch: its functions, methods, modules and tensors. Skipped without torch."""

from __future__ import annotations

import numpy as np
import pytest
from flashspark._graph import evaluate
from flashspark._trace import TraceError, trace, traced

torch = pytest.importorskip("torch")
F = torch.nn.functional

B, H, Q, K = 2, 3, 6, 5
generator = torch.Generator().manual_seed(0)
SLOPES = torch.rand(H, generator=generator, dtype=torch.float64)
BIAS = torch.randn(B, H, 8, generator=generator, dtype=torch.float64)
DOCS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
CAP = torch.tensor(2.0, dtype=torch.float64)


def grid():
    places = enumerate((B, H, Q, K))
    at = [torch.arange(n, dtype=torch.int32).reshape([-1 if i == j else 1 for j in range(4)]) for i, n in places]
    return torch.randn(B, H, Q, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64), at


def both(function, kind="score"):
    score, at = grid()
    found = trace(function, kind)
    want = function(*([score] if kind == "score" else []), *at)
    inputs = dict(zip(("b", "h", "q_idx", "kv_idx"), (x.numpy() for x in at)))
    (got,) = evaluate([found.result], {"score": score.numpy(), **inputs}, found.tensors, found.scalars)
    want = torch.as_tensor(want).to(torch.float64).numpy()
    np.testing.assert_allclose(got + np.zeros(score.shape), want + np.zeros(score.shape), rtol=1e-6, atol=1e-6)
    return found


ONE = [
    "tanh",
    "exp",
    "exp2",
    "expm1",
    "sigmoid",
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "erf",
    "erfc",
    "abs",
    "floor",
    "ceil",
    "trunc",
    "round",
    "frac",
    "square",
    "sign",
    "sgn",
    "neg",
    "positive",
    "relu",
    "isnan",
    "isinf",
    "isfinite",
    "isneginf",
    "isposinf",
    "zeros_like",
    "ones_like",
    "nan_to_num",
    "logical_not",
    "sqrt",
    "log",
    "log2",
    "log10",
    "log1p",
    "rsqrt",
    "reciprocal",
]


@pytest.mark.parametrize("name", ONE)
def test_functions_of_one(name):
    function = getattr(torch, name)
    low = 0.1 if name in ("sqrt", "log", "log2", "log10", "log1p", "rsqrt", "reciprocal") else -0.9
    both(lambda s, b, h, q, k: function(torch.clamp(s, low, 0.9)))
    if hasattr(torch.Tensor, name):
        both(lambda s, b, h, q, k: getattr(torch.clamp(s, low, 0.9), name)())


TWO = [
    "add",
    "sub",
    "mul",
    "div",
    "true_divide",
    "floor_divide",
    "remainder",
    "fmod",
    "minimum",
    "maximum",
    "fmin",
    "fmax",
    "atan2",
    "arctan2",
    "hypot",
    "logaddexp",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_xor",
]


@pytest.mark.parametrize("name", TWO)
def test_functions_of_two(name):
    function = getattr(torch, name)
    both(lambda s, b, h, q, k: function(s, BIAS[b, h, k]))
    both(lambda s, b, h, q, k: function(s, (q + 1)))


@pytest.mark.parametrize(
    "name", ["bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift"]
)
def test_bits(name):
    function = getattr(torch, name)
    both(lambda s, b, h, q, k: s + function(q, k & 3) + function(k, 2))
    both(lambda s, b, h, q, k: s + torch.bitwise_not(q) + ~k)


OTHERS = {
    "where": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    "where method": lambda s, b, h, q, k: s.where(q >= k, 0.0),
    "clamps": lambda s, b, h, q, k: (
        s.clamp(min=-0.5) + torch.clip(s, max=0.25) + s.clamp_min(0) + torch.clamp_max(q, 2)
    ),
    "div modes": lambda s, b, h, q, k: (
        torch.div(q - k, 2, rounding_mode="floor") + torch.div(q - k, 2, rounding_mode="trunc")
    ),
    "alpha": lambda s, b, h, q, k: torch.add(s, q, alpha=2) - torch.sub(s, k, alpha=3),
    "rsub": lambda s, b, h, q, k: torch.rsub(s, 2) + 1 / (s * s + 1) + (7 // (q + 1)) + 7 % (q + 1) + 2.0**k,
    "pow": lambda s, b, h, q, k: torch.pow(abs(s), 1.5) + s.pow(2) + torch.pow(2.0, k) + (q**2),
    "gelu": lambda s, b, h, q, k: F.gelu(s) + F.gelu(s, approximate="tanh"),
    "softplus": lambda s, b, h, q, k: F.softplus(s) + F.softplus(s * 30, beta=2.0) + F.logsigmoid(s),
    "units": lambda s, b, h, q, k: F.silu(s) + F.relu(s) + F.leaky_relu(s, 0.1) + torch.relu(s),
    "conversions": lambda s, b, h, q, k: (
        s.float() * 0 + q.float() / 2 + (s * 4).to(torch.int32) + k.long() + (q > 2).int()
    ),
    "types": lambda s, b, h, q, k: s + q.to(s.dtype) + (q > k).to(torch.float32) + k.type_as(s) + q.double(),
    "narrow": lambda s, b, h, q, k: (
        s + (q * 100).to(torch.int8) + (q * 100).to(torch.uint8) + (q * 9999).to(torch.int16)
    ),
    "lerp": lambda s, b, h, q, k: torch.lerp(s, s * 2, 0.25) + s.masked_fill(q > k, 1.0),
    "new": lambda s, b, h, q, k: s + s.new_zeros(()) + q.new_ones(()) + torch.full_like(s, 2.0) + s.new_full((), 0.5),
    "rank 0": lambda s, b, h, q, k: s * CAP + CAP * s + CAP / (s * s + CAP),
    "indices": lambda s, b, h, q, k: s + BIAS[b, h, k] - BIAS[:, 1][b, q] + BIAS[0][1][k] + SLOPES[h] * SLOPES[-1],
    "documents": lambda s, b, h, q, k: torch.where(DOCS[q] == DOCS[k], s, SLOPES[2]),
    "sizes": lambda s, b, h, q, k: s * BIAS.size(2) + BIAS.shape[0] + len(SLOPES) + BIAS.dim(),
    "made inside": lambda s, b, h, q, k: torch.where(q > k, s, torch.tensor(-5.0)) + torch.arange(6.0)[q],
    "detach": lambda s, b, h, q, k: s.detach().clone().contiguous(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    both(OTHERS[name])


def test_modules():
    class Bias(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", BIAS)
            self.weight = torch.nn.Parameter(SLOPES)
            self.scale = 0.5

        def forward(self, s, b, h, q, k):
            return s * self.scale + self.table[b, h, q] + self.weight[h]

    bias = Bias()
    found = trace(bias, "score")
    assert found.tensors[0] is bias.table and found.tensors[1] is bias.weight
    twice = trace(lambda s, b, h, q, k: bias(bias(s, b, h, q, k), b, h, q, k), "score")
    assert len(twice.tensors) == 2 and twice.text != found.text
    first = traced(bias, "score")
    assert traced(bias, "score") is first
    bias.scale = 0.25
    assert traced(bias, "score").text != first.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    bias = BIAS.to(dtype)
    found = trace(lambda s, b, h, q, k: s + bias[b, h, k], "score")
    name = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
    assert f"load 0 {name} 3 " in found.text
    (got,) = evaluate([found.result], {"score": 0, "b": 1, "h": 2, "kv_idx": 3}, found.tensors)
    assert got == float(bias[1, 2, 3])


def test_a_tensor_that_is_not_found_is_loaded():
    """Through torch's own indexing, where no stand-in takes the tensor's place."""
    found = trace(lambda s, b, h, q, k: s + torch.ones(8)[k], "score")
    assert len(found.tensors) == 1 and "load 0 f32 1 1" in found.text


def test_errors():
    with pytest.raises(TraceError, match=r"torch\.cumsum: is not supported"):
        trace(lambda s, b, h, q, k: torch.cumsum(s, 0), "score")
    with pytest.raises(TraceError, match="left without an index"):
        trace(lambda s, b, h, q, k: torch.where(q > k, s, BIAS[b]), "score")
    with pytest.raises(TraceError, match="float8"):
        table = torch.zeros(4).to(torch.float8_e4m3fn)
        trace(lambda s, b, h, q, k: s + table[h], "score")
    with pytest.raises(TraceError, match="the truth of a symbol"):
        trace(lambda s, b, h, q, k: s if q > k else -s, "score")


def test_compiled_functions():
    function = OTHERS["rank 0"]
    assert trace(torch.compile(function), "score").text == trace(function, "score").text
