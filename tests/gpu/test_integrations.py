"""Programs that call flashspark, on a GPU: transformers, torch's attention, ComfyUI's node and JAX.

tools/dev/gpu_integrations.sh programs installs what these need beside torch and transformers.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/python"))
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(device, shape=(2, 8, 150, 64), heads_kv=2, dtype=torch.bfloat16):
    """q, k and v (batch, heads, rows, width), as torch's attention has them."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, rows, width = shape
    shapes = [(batch, n, rows, width) for n in (heads, heads_kv, heads_kv)]
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def gradients(run, *tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = run(*leaves)
    out.float().square().sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def by_math(*tensors):
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)


def close(given, expected, tolerance):
    """Within the tolerance, of the largest element."""
    for a, b in zip(given, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_torch_sdpa(device, dtype):
    """Through torch's own registry of flash implementations, both passes."""
    import flashspark.integrations.torch as ours

    tensors = inputs(device, dtype=dtype)
    expected = gradients(by_math, *(x.double() for x in tensors))
    ours.register()
    ours.calls(reset=True)
    torch.nn.attention.activate_flash_attention_impl(ours.NAME)
    try:
        # On some GPUs, the H100 among them, torch prefers cuDNN to its flash implementation.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            given = gradients(lambda *x: scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True), *tensors)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert ours.calls(reset=True) == {"flashspark": 2}
    close(given, expected, TOLERANCE[dtype])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    assert not ours.calls()


@pytest.mark.needs_gpu
def test_torch_varlen_attn(device):
    """torch has it for CUDA only."""
    import flashspark.integrations.torch as ours
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in inputs(device, heads_kv=8))
    lengths = torch.tensor([0, 150, 300], dtype=torch.int32, device=device)
    run = lambda *x: varlen_attn(*x, lengths, lengths, 150, 150, window_size=(-1, 0))  # noqa: E731
    expected = gradients(run, q, k, v)
    ours.calls(reset=True)
    with ours.enabled():
        given = gradients(run, q, k, v)
    assert ours.calls() == {"flashspark": 2}
    close(given, expected, TOLERANCE[torch.bfloat16])


def installed(implementation):
    if implementation == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            pytest.skip("the stand-in flash_attn is not installed")
        import flash_attn

        assert "flashspark" in flash_attn.__doc__, f"{flash_attn.__file__} is not the stand-in"
    else:
        import flashspark.integrations.transformers

        flashspark.integrations.transformers.register()


def transformers_step(device, attention, dtype):
    """Logits of a padded batch, and the weights' gradients of its loss."""
    import tiny_models as tiny

    model = tiny.build(tiny.llama, attention).to(device, dtype)
    ids, mask = tiny.padded([40, 23, 31], "right")
    labels = ids.masked_fill(mask == 0, -100).to(device)
    ids, mask = ids.to(device), mask.to(device)
    result = model(input_ids=ids, attention_mask=mask, labels=labels)
    result.loss.backward()
    return [result.logits[mask.bool()].detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


IMPLEMENTATIONS = ["flashspark", pytest.param("flash_attention_2", marks=pytest.mark.needs_gpu)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transformers(device, implementation):
    """In bfloat16, logits and gradients are at most twice as far from float32 as those of eager attention."""
    pytest.importorskip("transformers")
    installed(implementation)
    expected = transformers_step(device, "eager", torch.float32)
    eager = transformers_step(device, "eager", torch.bfloat16)
    given = transformers_step(device, implementation, torch.bfloat16)
    for x, other, want in zip(given, eager, expected, strict=True):
        errors = [(y.double() - want.double()).norm() / want.double().norm() for y in (x, other)]
        assert errors[0] <= 2 * errors[1] + 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transformers_generates(device, implementation):
    """Greedily, from prompts padded on the left, in float16: each token is eager's best, or all but so."""
    pytest.importorskip("transformers")
    installed(implementation)
    import tiny_models as tiny

    model = tiny.build(tiny.llama, implementation).to(device, torch.float16)
    ids, mask = (x.to(device) for x in tiny.padded([12, 7, 20], "left"))
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
        eager = tiny.build(tiny.llama, "eager").to(device, torch.float16)
        mask = torch.nn.functional.pad(mask, (0, out.shape[1] - mask.shape[1]), value=1)
        logits = eager(input_ids=out, attention_mask=mask, position_ids=tiny.position_ids(mask)).logits.float()
    first = ids.shape[1]
    chosen = logits[:, first - 1 : -1].gather(2, out[:, first:, None])[..., 0]
    assert (logits[:, first - 1 : -1].max(-1).values - chosen).max() < 0.05


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_comfyui(device, dtype, monkeypatch):
    """The node's function in the stand-in for ComfyUI; a call with a mask goes to ComfyUI's own attention."""
    import comfyui_stand_in as comfy
    import flashspark.integrations.comfyui as ours

    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", comfy)
    monkeypatch.setattr(sys.modules["comfy.ldm.modules"], "attention", comfy, raising=False)
    monkeypatch.setattr(comfy, "REGISTERED_ATTENTION_FUNCTIONS", dict(comfy.REGISTERED_ATTENTION_FUNCTIONS))
    spec = importlib.util.spec_from_file_location("flashspark_node", ROOT / "integrations/comfyui/__init__.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    attention = comfy.get_attention_function("flashspark")
    q, k, v = (x.transpose(1, 2).flatten(2) for x in inputs(device, heads_kv=8, dtype=dtype))
    ours.calls(reset=True)
    with torch.no_grad():
        out = attention(q, k, v, 8)
        assert ours.calls(reset=True) == {"flashspark": 1}
        close([out], [comfy.attention_pytorch(q.double(), k.double(), v.double(), 8)], TOLERANCE[dtype])
        mask = torch.ones(150, 150, dtype=torch.bool, device=device).tril()
        masked = attention(q, k, v, 8, mask=mask)
    assert "flashspark" not in ours.calls(reset=True)
    close([masked], [comfy.attention_pytorch(q.double(), k.double(), v.double(), 8, mask)], TOLERANCE[dtype])


def test_jax(device, monkeypatch):
    """Under jit, with gradients."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise it takes most of the GPU's memory
    jax = pytest.importorskip("jax")
    pytest.importorskip("jax_tvm_ffi")
    import flashspark.jax as ours
    import numpy as np

    if device.type == "cuda" and not any(d.platform == "gpu" for d in jax.devices()):
        pytest.skip("JAX sees no GPU")
    tensors = inputs("cpu", dtype=torch.float16)
    expected = gradients(by_math, *(x.double() for x in tensors))
    arrays = [jax.numpy.asarray(x.transpose(1, 2).numpy()) for x in tensors]

    def loss(q, k, v):
        out = ours.flash_attn_func(q, k, v, causal=True)
        return (out.astype(jax.numpy.float32) ** 2).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    given = [torch.from_numpy(np.array(x)).transpose(1, 2) for x in (out, *grads)]
    close(given, expected, TOLERANCE[torch.float16])
