"""flashspark and the kernels that users would take instead, each as a function from Inputs to a call that writes out.

The peers other than torch come from a folder: site/ (FlashInfer and what it imports) and vLLM's extensions
_vllm_fa2_C.abi3.so and _vllm_fa3_C.abi3.so. What does not load is named and left out. Plans and scheduler metadata are
made before the call, as an engine makes them once a step for all layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashspark
import torch
from tensors import Inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from workloads import Workload

Call = Callable[[], Any]
_workspace: list[torch.Tensor] = []  # FlashInfer's scratch; its calls run one after the other
_ragged: dict[Workload, Any] = {}  # FlashInfer's plan for the current workload; all input sets have the same lengths


class NotOffered(Exception):
    """The peer does not support this workload."""


def ours(x: Inputs, **options: Any) -> Call:
    w = x.work
    if w.fp8:
        ones = torch.ones(w.batch, w.heads_kv, device=x.q.device)
        options |= {"k_descale": ones, "v_descale": ones}
    if w.softcap:
        options["softcap"] = w.softcap
    if w.page_size:
        options["scheduler_metadata"] = flashspark.get_scheduler_metadata(
            w.batch, w.seqlen_q, w.seqlen_k, w.heads_q, w.heads_kv, w.head_dim, x.seqused_k,
            x.k.dtype, cu_seqlens_q=x.cu_seqlens_q, causal=w.causal, has_softcap=w.softcap > 0,
        )  # fmt: skip
    return lambda: flashspark.flash_attn_varlen_func(
        x.q, x.k, x.v, x.cu_seqlens_q, None if w.page_size else x.cu_seqlens_k, w.seqlen_q, w.seqlen_k,
        causal=w.causal, out=x.out, block_table=x.page_table, seqused_k=x.seqused_k if w.page_size else None, **options,
    )  # fmt: skip


def torch_fa2(x: Inputs) -> Call:
    w = x.work
    if w.page_size or w.softcap or w.seqlen_q != w.seqlen_k:
        raise NotOffered("neither pages nor softcap nor causal from the bottom right")
    q, k, v = (t.view(w.batch, -1, *t.shape[1:]).transpose(1, 2) for t in (x.q, x.k, x.v))

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=w.causal, enable_gqa=w.heads_q != w.heads_kv)

    call.result = lambda: call().transpose(1, 2).reshape(x.out.shape)
    return call


def fa2(x: Inputs) -> Call:
    if x.work.fp8:
        raise NotOffered("no fp8")
    w, forward = x.work, torch.ops._vllm_fa2_C.varlen_fwd
    keys = (x.cu_seqlens_q, x.seqused_k) if w.page_size else (x.cu_seqlens_k, None)  # cu_seqlens_k is not read then
    return lambda: forward(
        x.q, x.k, x.v, x.out, x.cu_seqlens_q, *keys, None, x.page_table, None,  # leftpad_k, alibi_slopes
        w.seqlen_q, w.seqlen_k, 0.0, x.scale, False, w.causal,  # dropout, zero_tensors
        -1, -1, w.softcap, False, 0, None,  # window, softcap, return_softmax, num_splits (its choice), generator
    )  # fmt: skip


def fa3(x: Inputs) -> Call:
    if x.work.fp8:
        raise NotOffered("fp8 with q in bf16")
    w, ops = x.work, torch.ops._vllm_fa3_C
    if w.page_size:
        q, k, v, out, cu_seqlens_q, seqused_k = x.q, x.k, x.v, x.out, x.cu_seqlens_q, x.seqused_k
        metadata = ops.get_scheduler_metadata(
            w.batch, w.seqlen_q, w.seqlen_k, w.heads_q, w.heads_kv, w.head_dim, w.head_dim, x.q.dtype,
            seqused_k, cu_seqlens_q, None, None, None, None,  # cu_seqlens_k, cu_seqlens_k_new, seqused_q, leftpad_k
            w.page_size, 0, w.causal, -1, -1, w.softcap > 0,  # max_seqlen_k_new, window, has_softcap
            0, None, 0,  # num_splits, pack_gqa, sm_margin
        )  # fmt: skip
    else:
        q, k, v, out = (t.view(w.batch, -1, *t.shape[1:]) for t in (x.q, x.k, x.v, x.out))
        cu_seqlens_q = seqused_k = metadata = None
    return lambda: ops.fwd(
        q, k, v, None, None, None, out,  # k_new, v_new, q_v
        cu_seqlens_q, None, None, None, seqused_k, w.seqlen_q, w.seqlen_k,
        x.page_table, None, None, None, None, None,  # kv_batch_idx, leftpad_k, rotary cos, sin, seqlens
        None, None, None, x.scale, w.causal, -1, -1, w.softcap,  # descales, window, softcap
        True, metadata, 0, None, 0, None, 1, 0, None,  # rotary, splits, pack_gqa, margin, sinks, cp size
    )  # fmt: skip


def flashinfer(x: Inputs) -> Call:
    import flashinfer as library

    w = x.work
    if not _workspace:
        _workspace.append(torch.empty(256 << 20, dtype=torch.uint8, device=x.q.device))
    kinds = {
        "causal": w.causal,
        "sm_scale": x.scale,
        "q_data_type": x.q.dtype,
        "kv_data_type": x.k.dtype,
        "logits_soft_cap": w.softcap,
    }
    if not w.page_size:
        if w not in _ragged:
            ragged = library.BatchPrefillWithRaggedKVCacheWrapper(_workspace[0], "NHD", backend="fa2")
            ragged.plan(x.cu_seqlens_q, x.cu_seqlens_k, w.heads_q, w.heads_kv, w.head_dim, **kinds)
            _ragged.clear()
            _ragged[w] = ragged
        ragged = _ragged[w]
        return lambda: ragged.run(x.q, x.k, x.v, out=x.out)
    if w.fp8:
        raise NotOffered("no kernel of it was compiled ahead")
    paged = library.BatchPrefillWithPagedKVCacheWrapper(_workspace[0], "NHD", backend="fa2")
    paged.plan(x.cu_seqlens_q, *x.page_lists(), w.heads_q, w.heads_kv, w.head_dim, w.page_size, **kinds)
    return lambda: paged.run(x.q, (x.k, x.v), out=x.out)


def load(folder: Path | None, with_flashinfer: bool) -> dict[str, Callable[[Inputs], Call]]:
    """The peers that could be loaded."""
    loaded: dict[str, Callable[[Inputs], Call]] = {"torch FA2": torch_fa2}
    if folder is None:
        return loaded
    sys.path.append(str(folder / "site"))

    def extension(name: str) -> Callable[[], Any]:
        return lambda: torch.ops.load_library(str(folder / f"_vllm_{name}_C.abi3.so"))

    wanted = {"FA2": (fa2, extension("fa2")), "FA3": (fa3, extension("fa3"))}
    if with_flashinfer:
        wanted["FlashInfer"] = (flashinfer, lambda: __import__("flashinfer"))
    for name, (function, loader) in wanted.items():
        try:
            loader()
        except Exception as error:  # noqa: BLE001 - one peer's failure must not stop the others
            print(f"peer left out: {name}: {error!r:.300}", flush=True)
        else:
            loaded[name] = function
    return loaded
