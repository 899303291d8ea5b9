"""The tensors of a workload: several sets, together larger than the L2 cache, that all implementations share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from workloads import Workload

MOST_SETS = 256
MOST_BYTES = 24 << 30


@dataclass
class Inputs:
    """One set of inputs. q, out: (total_q, Hq, D). k, v: (total_k, Hkv, D), or pages with a page table."""

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
        """indptr, indices and number of tokens in the last page: FlashInfer's form of the page table."""
        size = self.work.page_size
        counts = [-(-k // size) for k in self.work.keys]
        indptr = torch.tensor([0, *counts]).cumsum(0).to(self.q.device, torch.int32)
        indices = torch.cat([row[:count] for row, count in zip(self.page_table, counts)])
        last = torch.tensor([k - (count - 1) * size for k, count in zip(self.work.keys, counts)])
        return indptr, indices, last.to(self.q.device, torch.int32)


def make(work: Workload, device: torch.device) -> Inputs:
    w = work

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    q = normal(w.batch * w.seqlen_q, w.heads_q, w.head_dim)
    table = None
    if w.page_size:
        counts = [-(-k // w.page_size) for k in w.keys]
        shape = (sum(counts), w.page_size, w.heads_kv, w.head_dim)
        order = torch.randperm(sum(counts), device=device).int()
        table = torch.zeros(w.batch, max(counts), dtype=torch.int32, device=device)
        for row, pages in zip(table, order.split(counts)):
            row[: len(pages)] = pages
    else:
        shape = (sum(w.keys), w.heads_kv, w.head_dim)
    lengths = torch.tensor(w.keys, dtype=torch.int32, device=device)
    k, v = normal(*shape), normal(*shape)
    if w.fp8:
        k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    return Inputs(w, q, k, v, torch.empty_like(q), offsets((w.seqlen_q,) * w.batch), offsets(w.keys), lengths, table)


def rotation(work: Workload, device: torch.device) -> list[Inputs]:
    """Makes enough sets that each has left the L2 cache before it is used again. They share the lengths, as the layers
    of a model do and as FlashInfer's plan requires."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20
    count = -(-4 * cache // work.bytes) + 1
    count = max(2, min(count, MOST_SETS, MOST_BYTES // work.bytes))
    first = make(work, device)
    lengths = {name: getattr(first, name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")}
    return [first, *(replace(make(work, device), **lengths) for _ in range(count - 1))]
