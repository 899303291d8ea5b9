"""SGLang's FlashAttention backend with flashspark's functions: what `--attention-backend flashspark` builds.

SGLang's class keeps its metadata, page tables, captured graphs, cascades and cache writes. Its attention goes through
two functions, and all that differs here is which ones:

- it takes flash_attn_varlen_func from sgl_kernel.flash_attn while it is constructed. A module of ours stands there
  meanwhile, so that SGLang's build of FlashAttention 3 (1.1 GB, no kernels for SM12x) is not even loaded.
- it calls its module's flash_attn_with_kvcache with its version, which is a number of ours: it equals 3, so that SGLang
  treats it as FlashAttention 3, and tells our calls from those of another backend in the same process.

Beside fp8 caches the queries stay in the model's type: flashspark takes them so.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.layers.attention import flashattention_backend as stock

from .. import _cache, _ops

KERNELS = "sgl_kernel.flash_attn"  # the module that the constructor imports its functions from
INSTEAD = "use --attention-backend triton or flashinfer"


class Version(int):
    """FlashAttention's version to SGLang, and a mark of our calls."""


VERSION = Version(3)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cu_seqlens_k_new: torch.Tensor | None = None,  # lengths of the cache: cache_seqlens has them, and nothing is new
    num_splits: int = 0,
    **given: Any,
) -> Any:
    """A call as SGLang's backend makes it: packed queries over pages that hold their keys already."""
    return _cache.flash_attn_with_kvcache(
        q, k_cache, v_cache, num_splits=num_splits, deterministic=num_splits == 1, **given
    )


def flash_attn_varlen_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
    """A call as SGLang's backend makes it for embeddings: packed queries and keys, no cache."""
    return _ops.flash_attn_varlen_func(q, k, v, deterministic=given.get("num_splits") == 1, **given)


def install() -> None:
    """Lets calls with our version come here. SGLang's others, of any version, go where they went."""
    original = stock.flash_attn_with_kvcache
    if getattr(original, "flashspark", False):
        return

    @functools.wraps(original)
    def dispatch(*args: Any, ver: int = 3, **kwargs: Any) -> Any:
        if isinstance(ver, Version):
            return flash_attn_with_kvcache(*args, **kwargs)
        return original(*args, ver=ver, **kwargs)

    dispatch.flashspark = True  # type: ignore[attr-defined]
    stock.flash_attn_with_kvcache = dispatch


@contextmanager
def _our_kernels() -> Iterator[None]:
    """In it sgl_kernel.flash_attn is flashspark."""
    module = types.ModuleType(KERNELS)
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    module.get_scheduler_metadata = None  # type: ignore[attr-defined] # SGLang's buffer has FlashAttention 3's layout
    theirs = sys.modules.get(KERNELS)
    sys.modules[KERNELS] = module
    try:
        yield
    finally:
        if theirs is None:
            del sys.modules[KERNELS]
        else:
            sys.modules[KERNELS] = theirs


def check(runner: Any) -> None:
    """Raises NotImplementedError, with what to do instead, unless flashspark computes the runner's attention."""
    if not hasattr(stock.FlashAttentionBackend, "prepare_paged_mha_query"):
        raise NotImplementedError(f"--attention-backend flashspark: this SGLang is too old or too new; {INSTEAD}")
    if runner.use_mla_backend:
        raise NotImplementedError(f"--attention-backend flashspark: no absorbed MLA; {INSTEAD}")
    if runner.kv_cache_dtype_str == "mxfp8":
        raise NotImplementedError(f"--attention-backend flashspark: no mxfp8 cache; {INSTEAD}")
    try:
        _explain(runner)
    except (RuntimeError, ValueError, TypeError) as error:  # torch's too, of types that it cannot make
        raise NotImplementedError(f"--attention-backend flashspark: {error}\n{INSTEAD}") from error


def _explain(runner: Any) -> None:
    """Asks flashspark for one step of decoding, which raises what it lacks; computes nothing.

    strict: a cache whose rows have to be copied is refused, since that would be done in every call.
    """
    config = runner.model_config
    width = stock.get_parallel().attn_tp_size
    heads, heads_kv = config.hf_text_config.num_attention_heads // width, config.get_num_kv_heads(width)

    def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=runner.device)

    k = tensor(1, runner.page_size, heads_kv, config.head_dim, dtype=runner.kv_cache_dtype)
    v = tensor(1, runner.page_size, heads_kv, config.v_head_dim, dtype=runner.kv_cache_dtype)
    flash_attn_with_kvcache(
        tensor(1, heads, config.head_dim, dtype=config.dtype),
        *(k, v),
        cache_seqlens=tensor(1, dtype=torch.int32),
        page_table=tensor(1, 1, dtype=torch.int32),
        cu_seqlens_q=tensor(2, dtype=torch.int32),
        max_seqlen_q=1,
        causal=True,
        explain=True,
        strict=True,
    )


class FlashSparkBackend(stock.FlashAttentionBackend):
    """SGLang's FlashAttention 3 backend on flashspark's kernels."""

    def __init__(self, model_runner: Any, *args: Any, **kwargs: Any) -> None:
        check(model_runner)
        install()
        with _our_kernels():
            super().__init__(model_runner, *args, **kwargs, fa_impl_ver=3)
        self.fa_impl_ver = VERSION

    def prepare_paged_mha_query(
        self, q: torch.Tensor, q_rope: Any, k_rope: Any, layer: Any, **sizes: Any
    ) -> tuple[torch.Tensor, Any, Any, torch.Tensor | None, torch.Tensor | None]:
        """The query as it is, and the scales of an fp8 cache: one number each, which fits any number of sequences."""
        if self.kv_cache_dtype != torch.float8_e4m3fn or layer.k_scale is None:
            return q, q_rope, k_rope, None, None
        return q, q_rope, k_rope, layer.k_scale.reshape(1), layer.v_scale.reshape(1)


class FlashSparkMultiStepBackend(stock.FlashAttentionMultiStepBackend):
    """One backend for each of a draft's decoding steps but the last, whose token comes without attention."""

    def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int) -> None:
        super().__init__(model_runner, topk, 1)  # SGLang's container with no steps, which would be backends of its own
        self.speculative_num_steps = speculative_num_steps
        self.attn_backends.extend(
            FlashSparkBackend(
                model_runner, speculative_step_id=step, topk=topk, speculative_num_steps=speculative_num_steps
            )
            for step in range(speculative_num_steps - 1)
        )
