"""The tensors of a workload: several sets, together larger than the L2 cache, that all implementations share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from workloads import Workload

MOST_SETS = 256
MOST_BYTES = 24 << 30


@dataclass
class Inputs:
    """One set. q, out: (total_q, Hq, D). k, v: (total_k, Hkv, D), or pages with a table."""

    work: Workload
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqused_k: torch.Tensor
    page_table: torch.Tensor | None

    @property
    def scale(self) -> float:
        return self.work.head_dim**-0.5

    def page_lists(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """indptr, indices, tokens in the last page: the ragged page table that FlashInfer takes."""
        pages = -(-self.work.seqlen_k // self.work.page_size)
        last = self.work.seqlen_k - (pages - 1) * self.work.page_size
        indptr = torch.arange(self.work.batch + 1, dtype=torch.int32, device=self.q.device) * pages
        return indptr, self.page_table[:, :pages].reshape(-1).contiguous(), torch.full_like(self.seqused_k, last)


def make(work: Workload, device: torch.device) -> Inputs:
    w = work

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    def offsets(length: int) -> torch.Tensor:
        return torch.arange(w.batch + 1, dtype=torch.int32, device=device) * length

    q = normal(w.batch * w.seqlen_q, w.heads_q, w.head_dim)
    table = None
    if w.page_size:
        count = -(-w.seqlen_k // w.page_size)
        shape = (w.batch * count, w.page_size, w.heads_kv, w.head_dim)
        table = torch.randperm(w.batch * count, device=device).int().view(w.batch, count)
    else:
        shape = (w.batch * w.seqlen_k, w.heads_kv, w.head_dim)
    lengths = torch.full((w.batch,), w.seqlen_k, dtype=torch.int32, device=device)
    k, v = normal(*shape), normal(*shape)
    return Inputs(w, q, k, v, torch.empty_like(q), offsets(w.seqlen_q), offsets(w.seqlen_k), lengths, table)


def rotation(work: Workload, device: torch.device) -> list[Inputs]:
    """Enough sets that each is out of the L2 cache again when its turn comes. They share the lengths, as layers of a
    model do and as FlashInfer's plan is shared."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20
    count = -(-4 * cache // work.bytes) + 1
    count = max(2, min(count, MOST_SETS, MOST_BYTES // work.bytes))
    first = make(work, device)
    lengths = {name: getattr(first, name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")}
    return [first, *(replace(make(work, device), **lengths) for _ in range(count - 1))]
