"""CUDA arrays of CuPy and JAX, zero copy through DLPack."""

from __future__ import annotations

import flashspark
import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.needs_gpu


def inputs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, 100, heads, 64)).astype(np.float16) for heads in (4, 2, 2)]


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    q, k, v = (torch.from_numpy(x).double().transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).numpy()


def test_cupy():
    cupy = pytest.importorskip("cupy")
    arrays = inputs()
    q, k, v = (cupy.asarray(x) for x in arrays)
    out = cupy.full(q.shape, cupy.nan, q.dtype)
    cupy.cuda.runtime.deviceSynchronize()
    assert flashspark.flash_attn_func(q, k, v, causal=True, out=out) is out
    cupy.cuda.runtime.deviceSynchronize()
    assert np.abs(cupy.asnumpy(out) - expected(*arrays)).max() < 2e-3


def test_cupy_on_its_current_stream():
    """The call sees the work that was queued on the stream before it."""
    cupy = pytest.importorskip("cupy")
    arrays = inputs()
    q, k, v = (cupy.asarray(x) for x in arrays)
    late, out = cupy.full(q.shape, cupy.nan, q.dtype), cupy.empty_like(q)
    busy = cupy.random.random((4096, 4096), dtype=cupy.float32)
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(30):
            busy = busy @ busy
            busy /= cupy.abs(busy).max()
        late[...] = q
        flashspark.flash_attn_func(late, k, v, causal=True, out=out)
        stream.synchronize()
    assert np.abs(cupy.asnumpy(out) - expected(*arrays)).max() < 2e-3


def test_jax(monkeypatch):
    """JAX arrays are immutable, so out is a torch tensor."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise it takes most of the GPU's memory
    jax = pytest.importorskip("jax")
    if not any(d.platform == "gpu" for d in jax.devices()):
        pytest.skip("JAX sees no GPU")
    arrays = inputs()
    q, k, v = (jax.device_put(x) for x in arrays)
    jax.block_until_ready((q, k, v))
    out = torch.full(q.shape, float("nan"), dtype=torch.float16, device="cuda")
    flashspark.flash_attn_func(q, k, v, causal=True, out=out)
    assert np.abs(out.cpu().numpy() - expected(*arrays)).max() < 2e-3
