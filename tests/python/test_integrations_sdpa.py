"""torch's scaled_dot_product_attention through flashspark.integrations.torch, against torch's math kernel."""

from __future__ import annotations

import inspect
import math

import pytest

torch = pytest.importorskip("torch")
if not hasattr(torch.library, "get_kernel"):
    pytest.skip("torch has no torch.library.get_kernel", allow_module_level=True)

import flashspark.integrations.torch as sdpa  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

NAME = "_scaled_dot_product_flash_attention_for_cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def off_again():
    sdpa.calls(reset=True)
    yield
    sdpa.disable()
    assert not sdpa.is_enabled("cpu") and not sdpa.is_enabled("cuda")


def inputs(shape=(2, 4, 7, 16), keys=None, heads=None, dtype=torch.float32, seed=0):
    """q, k, v: (batch, heads, length, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads_q, length, width = shape
    others = (batch, heads or heads_q, keys or length, width)
    return [torch.randn(s, generator=generator).to(dtype) for s in (shape, others, others)]


def by_math(q, k, v, **options):
    """torch's plain formula in double precision."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)


def check(q, k, v, **options):
    with sdpa.enabled():
        out = scaled_dot_product_attention(q, k, v, **options)
    assert sdpa.calls(reset=True) == {"flashspark": 1}
    expected = by_math(q, k, v, **options)
    own = scaled_dot_product_attention(q, k, v, **options)
    assert sdpa.calls() == {}
    assert out.shape == expected.shape and out.dtype == q.dtype and out.stride() == own.stride()
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 8), (2, 4, 7, 16), (1, 2, 130, 64), (3, 2, 33, 128), (1, 1, 5, 20)], ids=str
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_shapes_and_types(shape, dtype, is_causal):
    check(*inputs(shape, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize(("rows", "keys"), [(1, 9), (9, 1), (5, 40), (40, 5), (64, 65), (65, 64)])
def test_causal_counts_from_the_top_left(rows, keys):
    q, k, v = inputs((2, 2, rows, 32), keys=keys)
    check(q, k, v, is_causal=True)
    check(q, k, v)


@pytest.mark.parametrize(("heads", "heads_kv"), [(4, 2), (6, 1), (8, 8)])
def test_grouped_heads(heads, heads_kv):
    check(*inputs((2, heads, 17, 32), keys=21, heads=heads_kv), enable_gqa=True)


def test_scale():
    check(*inputs(), scale=0.37)


def test_any_strides():
    q, k, v = inputs((2, 4, 19, 32))
    check(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)))
    check(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
    check(q, k[:1].expand_as(k), v[:1].expand_as(v))


def test_both_results_are_those_of_torch():
    q, k, v = inputs((2, 4, 9, 32), keys=12)
    operator = getattr(torch.ops.aten, NAME)
    own = operator(q, k, v, is_causal=True)
    with sdpa.enabled():
        ours = operator(q, k, v, is_causal=True)
    for a, b in zip(ours, own):
        assert a.stride() == b.stride() and a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    assert sdpa.calls() == {"flashspark": 1}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    with mode():
        check(*inputs())
    q, k, v = (x.requires_grad_() for x in inputs())
    with mode(), sdpa.enabled():
        scaled_dot_product_attention(q, k, v)
    assert sdpa.calls() == {"flashspark": 1}


def gradients(function, *tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    function(*leaves).square().sum().backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("keys", [7, 12, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_training(dtype, keys, is_causal):
    """Both passes run here; torch's causal mask starts from the top left corner also where the lengths differ."""
    tensors = inputs((2, 4, 7, 16), keys, dtype=dtype)
    run = lambda *x: scaled_dot_product_attention(*x, is_causal=is_causal)  # noqa: E731
    with sdpa.enabled():
        given = gradients(run, *tensors)
    assert sdpa.calls() == {"flashspark": 2}
    expected = gradients(lambda *x: by_math(*x, is_causal=is_causal), *tensors)
    for a, b in zip(given, expected):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=10 * TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("ours", ["forward", "backward"])
def test_one_pass_here_and_one_in_torch(ours):
    tensors = inputs((2, 4, 9, 32), 12)
    expected = gradients(lambda *x: scaled_dot_product_attention(*x, is_causal=True), *tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    if ours == "forward":
        with sdpa.enabled():
            out = scaled_dot_product_attention(*leaves, is_causal=True)
        out.square().sum().backward()
    else:
        out = scaled_dot_product_attention(*leaves, is_causal=True)
        with sdpa.enabled():
            out.square().sum().backward()
    assert sdpa.calls() == {"flashspark": 1}
    for a, b in zip([x.grad for x in leaves], expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_backward_pass_of_the_cuda_operator():
    """Its function on CPU tensors, from what the forward function gives: +inf for rows without keys."""
    from flashspark.integrations import _torch_backward

    q, k, v = inputs((2, 2, 6, 16), keys=4)
    out, lse, *_, seed, offset, _debug = sdpa._for_cuda(q, k, v, 0.0, True, scale=None)
    dout = torch.randn_like(out)
    given = _torch_backward._for_cuda(dout, q, k, v, out, lse, None, None, 6, 4, 0.0, True, seed, offset)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    for i in range(2):
        result, _ = bottom_right(*(x[i].transpose(0, 1) for x in leaves))
        (result * dout[i].transpose(0, 1).double()).sum().backward()
    for x, leaf in zip(given, leaves):
        torch.testing.assert_close(x.double(), leaf.grad.nan_to_num(), atol=1e-4, rtol=1e-4)


def test_what_is_left_to_torch_in_training():
    q, k, v = inputs()
    mask = torch.ones(7, 7).tril().bool()
    expected = gradients(lambda *x: scaled_dot_product_attention(*x, attn_mask=mask), q, k, v)
    with sdpa.enabled():
        given = gradients(lambda *x: scaled_dot_product_attention(*x, attn_mask=mask), q, k, v)
    assert sdpa.calls() == {"torch: attn_mask": 2}
    assert all(torch.equal(a, b) for a, b in zip(given, expected))


def test_what_is_left_to_torch():
    q, k, v = inputs()
    mask = torch.ones(7, 7).tril().bool()
    wide = inputs((1, 1, 3, 520))
    with sdpa.enabled():
        masked = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        doubled = scaled_dot_product_attention(q.double(), k.double(), v.double())
        wider = scaled_dot_product_attention(*wide)
        scaled_dot_product_attention(q, k, v, dropout_p=0.5)  # torch asks another operator
    torch.testing.assert_close(masked.double(), by_math(q, k, v, attn_mask=mask), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(doubled, by_math(q, k, v))
    torch.testing.assert_close(wider.double(), by_math(*wide), atol=2e-5, rtol=2e-5)
    counted = sdpa.calls()
    assert counted.pop("torch: attn_mask") == 1 and counted.pop("torch: dtype torch.float64") == 1
    ((reason, count),) = counted.items()
    assert count == 1 and reason.startswith("torch: ") and "520" in reason


def test_the_switch_and_its_nesting():
    q, k, v = inputs()
    own = str(torch.library.get_kernel(f"aten::{NAME}", "CPU"))
    sdpa.enable()
    sdpa.enable("cpu")
    assert sdpa.is_enabled("cpu") and not sdpa.is_enabled("cuda")
    with sdpa.enabled(), sdpa.enabled("cpu"):
        assert sdpa.is_enabled("cuda")
        sdpa.disable()
        scaled_dot_product_attention(q, k, v)
    assert not sdpa.is_enabled("cpu")
    scaled_dot_product_attention(q, k, v)
    assert sdpa.calls() == {"flashspark": 1}
    with pytest.raises(RuntimeError, match="inside"), sdpa.enabled():
        raise RuntimeError("inside")
    sdpa.disable()
    assert str(torch.library.get_kernel(f"aten::{NAME}", "CPU")) == own
    with pytest.raises(ValueError, match="devices = 'tpu'"):
        sdpa.enable("tpu")


def test_the_cuda_operators_are_overridden_and_restored():
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_flash_attention_forward", "CUDA"):
        pytest.skip("torch is built without CUDA")
    names = ("_scaled_dot_product_flash_attention", "_flash_attention_forward")
    own = [str(torch.library.get_kernel(f"aten::{name}", "CUDA")) for name in names]
    with sdpa.enabled("cuda"):
        ours = [str(torch.library.get_kernel(f"aten::{name}", "CUDA")) for name in names]
    assert not {*own} & {*ours}
    assert own == [str(torch.library.get_kernel(f"aten::{name}", "CUDA")) for name in names]


def test_torchs_registry():
    attention = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        with pytest.raises(NotImplementedError, match="enable"):
            sdpa.register()
        return
    sdpa.register()
    attention.activate_flash_attention_impl("FLASHSPARK")
    try:
        assert sdpa.is_enabled("cpu") and sdpa.is_enabled("cuda")
        scaled_dot_product_attention(*inputs())
        attention.activate_flash_attention_impl("FLASHSPARK")  # torch removes the first one before
    finally:
        registry = attention._registry
        if restore := getattr(registry, "restore_flash_attention_impl", None):
            restore()
        else:  # torch 2.10 has no way back
            registry._FLASH_ATTENTION_HANDLES.pop("FLASHSPARK").remove()
            registry._FLASH_ATTENTION_ACTIVE = None
    scaled_dot_product_attention(*inputs())
    assert sdpa.calls() == {"flashspark": 1}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def test_compiled():
    """One graph for both settings of the switch, which acts at run time, and for several lengths."""
    torch.manual_seed(0)
    model = Block()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (5, 12):
            x = torch.randn(2, length, 32)
            expected = model(x)
            with sdpa.enabled():
                torch.testing.assert_close(compiled(x), expected)
            torch.testing.assert_close(compiled(x), expected)
    assert sdpa.calls() == {"flashspark": 2}


def test_compiled_training_has_torchs_gradients():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 9, 32)

    def gradients(run):
        model.zero_grad()
        run(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(model)
    with sdpa.enabled():
        given = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert sdpa.calls() == {"flashspark": 2}
    for a, b in zip(given, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_transformer_layer():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1).eval()
    x = torch.randn(2, 6, 32)
    expected = layer(x).detach()
    with sdpa.enabled(), torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            out = layer(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert sdpa.calls() == {"flashspark": 1}
    torch.testing.assert_close(out, expected)


def bottom_right(q, k, v, left=None):
    """Causal attention of (length, heads, head_dim) from the bottom right corner, and its logsumexp."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    distance = torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1])
    hidden = (distance > 0) | (distance < -left if left is not None else False)
    scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)
    return (scores.softmax(-1).nan_to_num() @ v).transpose(0, 1), lse.masked_fill(lse == -math.inf, math.inf)


def test_results_of_the_cuda_operator():
    """Its function on CPU tensors: nine results, a causal mask from the bottom right, +inf for rows without keys."""
    q, k, v = inputs((2, 2, 6, 16), keys=4)
    out, lse, cum_q, cum_k, max_q, max_k, rng_state, offset, debug = sdpa._for_cuda(q, k, v, 0.0, True, scale=None)
    assert (cum_q, cum_k, max_q, max_k) == (None, None, 6, 4)
    assert rng_state.shape == (2,) and rng_state.dtype == torch.uint64 and offset.shape == () and debug.numel() == 0
    assert out.stride() == q.stride() and lse.is_contiguous()
    for i in range(2):
        expected, logs = bottom_right(*(x[i].transpose(0, 1) for x in (q, k, v)))
        torch.testing.assert_close(out[i].transpose(0, 1).double(), expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse[i].double(), logs, atol=2e-5, rtol=2e-5)
    meta = [x.to("meta") for x in (q, k, v)]
    promised = torch.ops.aten._scaled_dot_product_flash_attention(*meta, 0.0, True)
    for ours, theirs in zip((out, lse, rng_state, offset, debug), (*promised[:2], *promised[6:])):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@pytest.mark.parametrize("left", [None, 2])
def test_varlen_operator(left):
    """_flash_attention_forward on packed sequences, one of them with more queries than keys."""
    lengths, keys = [3, 5, 1], [7, 2, 4]
    q = torch.randn(9, 4, 16)
    k, v = torch.randn(2, 13, 2, 16)
    cum_q, cum_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in (lengths, keys))
    with sdpa.enabled("cpu"):
        out, lse, *rest = torch.ops.aten._flash_attention_forward(
            *(q, k, v, cum_q, cum_k, 5, 7, 0.0, True, False), window_size_left=left
        )
    assert sdpa.calls() == {"flashspark": 1} and len(rest) == 3 and lse.shape == (4, 9)
    for i in range(3):
        rows, columns = slice(cum_q[i], cum_q[i + 1]), slice(cum_k[i], cum_k[i + 1])
        wide = [x[columns].repeat_interleave(2, 1) for x in (k, v)]
        expected, logs = bottom_right(q[rows], *wide, left)
        torch.testing.assert_close(out[rows].double(), expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse[:, rows].double(), logs, atol=2e-5, rtol=2e-5)


def test_varlen_attn_and_its_limits():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q = torch.randn(9, 4, 16)
    cum = torch.tensor([0, 4, 9], dtype=torch.int32)
    with sdpa.enabled("cpu"):
        causal = {"window_size": (-1, 0)}
        if "window_size" not in inspect.signature(varlen.varlen_attn).parameters:  # torch 2.10
            causal = {"is_causal": True}
        out = varlen.varlen_attn(q, q, q, cum, cum, 5, 5, **causal)
        with pytest.raises(NotImplementedError, match="dropout: torch has no kernel for CPU"):
            torch.ops.aten._flash_attention_forward(q, q, q, cum, cum, 5, 5, 0.5, True, False)
    for rows in (slice(0, 4), slice(4, 9)):
        expected, _ = bottom_right(q[rows], q[rows], q[rows])
        torch.testing.assert_close(out[rows].double(), expected, atol=2e-5, rtol=2e-5)
    assert sdpa.calls(reset=True) == {"flashspark": 1}
    with sdpa.enabled("cpu"):
        (given,) = gradients(lambda x: varlen.varlen_attn(x, x, x, cum, cum, 5, 5, **causal), q)
    assert sdpa.calls() == {"flashspark": 2}
    (want,) = gradients(lambda x: torch.cat([bottom_right(x[a:b], x[a:b], x[a:b])[0] for a, b in ((0, 4), (4, 9))]), q)
    torch.testing.assert_close(given, want, atol=1e-4, rtol=1e-4)


def test_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = inputs((1, 2, 40, 32))
    expected = by_math(q, k, v)

    def call(_):
        with sdpa.enabled("cpu"):
            return scaled_dot_product_attention(q, k, v)

    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(call, range(40)):
            torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    assert sdpa.calls() == {"flashspark": 40}
