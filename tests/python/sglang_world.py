"""SGLang's own Python files without a GPU: what they import that is not there, and a model runner's parts.

The registry, the arguments, the backend, the memory pools and the batches are SGLang's; compiled kernels and the model
runner are stood in for. Imported by sglang_checks.py only, in a process of its own: the stand-ins stay in sys.modules.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch._dynamo
import torch._higher_order_ops
import torch._inductor.compile_fx
import torch.nn.attention.flex_attention
import torch.utils.flop_counter
import transformers.models.auto.image_processing_auto

# The imports are made before there are stand-ins: torch looks for triton in them, and transformers for torchvision.

# Some are installed in some environments. They are stood in for everywhere, so that the checks are the same.
ABSENT = ("IPython", "orjson", "sentencepiece", "sgl_kernel", "torchvision", "triton")


class _Absent(types.ModuleType):
    """A module that has every name; all do nothing."""

    __path__: tuple[str, ...] = ()
    __version__ = "99"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=f"{self.__name__}.{name}"))
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        pass


def merge_state_v2(o, lse, o_other, lse_other):
    """sgl_kernel's: (rows, heads, head_dim) and (rows, heads) of two sets of keys, as one."""
    both = torch.logaddexp(lse, lse_other)
    parts = ((x.float() * (part - both).exp()[..., None]) for x, part in ((o, lse), (o_other, lse_other)))
    return sum(parts).to(o.dtype), both


def normal_decode_set_metadata(
    cache_seqlens, cu_seqlens_k, page_table, req_to_token, rows, max_pages, seq_lens, delta, page_size, *args, **kwargs
):
    """SGLang's Triton kernel, of which only the full cache's table is asked here."""
    cache_seqlens.copy_(seq_lens + delta)
    cu_seqlens_k[1:].copy_(cache_seqlens.cumsum(0))
    for row, (slots, length) in enumerate(zip(req_to_token[rows], cache_seqlens.tolist())):
        pages = slots[0:length:page_size] // page_size
        page_table[row, : len(pages)] = pages


def enter() -> None:
    """Makes SGLang importable."""
    torch._dynamo.config.disable = True
    sys.meta_path.insert(0, _Finder())
    import sglang  # noqa: F401

    transformers.AutoImageProcessor = MagicMock()  # needs the real torchvision
    import sgl_kernel

    sgl_kernel.merge_state_v2 = merge_state_v2
    from sglang.srt.layers.attention import flashattention_backend as stock

    stock.normal_decode_set_metadata = normal_decode_set_metadata
    spec = SimpleNamespace(speculative_eagle_topk=0, speculative_num_draft_tokens=None, speculative_algorithm=None)
    bags = {
        "get_spec": spec,
        "get_exec": SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False)),
        "get_model": SimpleNamespace(is_embedding=False),
        "get_schedule": SimpleNamespace(chunked_prefill_size=-1),
        "get_memory": SimpleNamespace(disable_radix_cache=True),
        "get_parallel": SimpleNamespace(
            attn_cp_size=1, attn_tp_size=1, enable_prefill_cp=False, attn_dp_enabled=False, dcp_enabled=False
        ),
    }
    for name, bag in bags.items():
        setattr(stock, name, lambda bag=bag: bag)
    stock.is_cp_active = lambda batch: False
    State.bags = bags


class State:
    bags: dict[str, SimpleNamespace]


def speculate(topk: int = 0, draft_tokens: int | None = None) -> None:
    spec = State.bags["get_spec"]
    spec.speculative_eagle_topk, spec.speculative_num_draft_tokens = topk, draft_tokens


def _slots(pages: int, page_size: int, seed: int) -> torch.Tensor:
    """The token slots (pages, page_size) of all pages but the first, in random order."""
    order = 1 + torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
    return order[:, None] * page_size + torch.arange(page_size)


class Model:
    """What a model runner has, for one layer of full attention and one with a sliding window."""

    def __init__(
        self,
        page_size=1,
        dtype=torch.float32,
        cache_dtype=None,
        head_dim=32,
        v_head_dim=None,
        window=None,
        window_pool=False,  # layers with a window have a cache of their own
    ):
        from sglang.srt.configs.model_config import AttentionArch
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache import kv_index_translator as translator
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        translator.get_parallel = lambda: State.bags["get_parallel"]
        v_head_dim = v_head_dim or head_dim
        self.heads, self.heads_kv, self.page_size, self.context = 4, 2, page_size, 320
        self.requests = ReqToTokenPool(4, self.context, "cpu", False)
        pages = 4 * self.context // page_size
        size, kind = pages * page_size, cache_dtype or dtype
        if window_pool:
            self.pool = SWAKVPool(size, size, page_size, kind, self.heads_kv, head_dim, [0], [1], "cpu")
            self.pool.register_mapping(torch.cat([torch.arange(page_size), _slots(pages, page_size, seed=6).flatten()]))
        else:
            self.pool = MHATokenToKVPool(
                *(size, page_size, kind, self.heads_kv, head_dim, 2, "cpu", False), v_head_dim=v_head_dim
            )
        slots = _slots(pages, page_size, seed=5).view(4, -1)
        self.requests.req_to_token[1:] = slots[:, : self.context].int()
        config = SimpleNamespace(
            is_encoder_decoder=False, context_len=self.context, attention_arch=AttentionArch.MHA, head_dim=head_dim,
            v_head_dim=v_head_dim, dtype=dtype, is_local_attention_model=False, get_num_kv_heads=lambda n: 2 // n,
            hf_text_config=SimpleNamespace(num_attention_heads=self.heads, attn_logit_softcapping=None),
        )  # fmt: skip
        self.runner = SimpleNamespace(
            model_config=config, device="cpu", req_to_token_pool=self.requests, token_to_kv_pool=self.pool,
            kv_cache_dtype=cache_dtype or dtype, kv_cache_dtype_str="fp8_e4m3" if cache_dtype else "auto",
            page_size=page_size, is_draft_worker=False, use_mla_backend=False, sliding_window_size=window,
            attention_chunk_size=None, prefill_attention_backend_str="flashspark",
            decode_attention_backend_str="flashspark",
            kv_index_translator=translator.KVIndexTranslator(
                req_to_token=self.requests.req_to_token, token_to_kv_pool_allocator=None, token_to_kv_pool=self.pool,
                page_size=page_size, device="cpu",
            ),
        )  # fmt: skip
        self.layer = lambda **options: RadixAttention(
            self.heads, head_dim, head_dim**-0.5, self.heads_kv, 0, v_head_dim=v_head_dim, **options
        )
        self.dtype, self.head_dim, self.v_head_dim = dtype, head_dim, v_head_dim
        self.generator = torch.Generator().manual_seed(7)

    def random(self, rows: int):
        """q, k and v of so many tokens, as a model's layer gives them."""
        sizes = (self.heads * self.head_dim, self.heads_kv * self.head_dim, self.heads_kv * self.v_head_dim)
        q, k, v = (torch.randn(rows, n, generator=self.generator).to(self.dtype) for n in sizes)
        return q, k.view(rows, self.heads_kv, -1), v.view(rows, self.heads_kv, -1)

    def slots(self, request: int, first: int, last: int) -> torch.Tensor:
        return self.requests.req_to_token[request, first:last].long()

    def batch(self, mode: str, before: list[int], new: list[int], spec_info=None):
        """Requests 1, 2, ... with `before` tokens in the cache and `new` ones in the batch."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        counts = before if mode == "TARGET_VERIFY" else [a + b for a, b in zip(before, new)]  # as SGLang counts them
        lengths = torch.tensor(counts)
        rows = torch.arange(1, len(new) + 1)
        where = torch.cat([self.slots(r, a, a + b) for r, (a, b) in enumerate(zip(before, new), 1)])
        plan = self.runner.kv_index_translator.plan(
            req_pool_indices=rows, seq_lens=lengths, seq_lens_cpu=lengths, write_virtual=where
        )
        return ForwardBatch(
            forward_mode=ForwardMode[mode], batch_size=len(new), input_ids=torch.zeros(sum(new), dtype=torch.long),
            req_pool_indices=rows, seq_lens=lengths, out_cache_loc=where, seq_lens_sum=int(lengths.sum()),
            seq_lens_cpu=lengths, extend_seq_lens=torch.tensor(new), extend_seq_lens_cpu=list(new),
            extend_prefix_lens=torch.tensor(before), extend_prefix_lens_cpu=list(before),
            spec_info=spec_info, kv_loc_plan=plan,
            positions=torch.cat([torch.arange(a, a + b) for a, b in zip(before, new)]),
        )  # fmt: skip
