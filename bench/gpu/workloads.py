"""The workloads that are timed, as data: prefill, chunks, decode and paged layouts of the shapes that engines use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """`batch` sequences of `seqlen_q` new rows at the end of `seqlen_k` keys (or of `lengths`), bf16."""

    group: str  # row of the table
    batch: int
    heads_q: int
    heads_kv: int
    head_dim: int
    seqlen_q: int
    seqlen_k: int
    causal: bool
    page_size: int = 0  # 0: contiguous q, k and v
    must: float = 0.0  # required ratio to the best mma.sync peer, or to our own contiguous call if `own` is set
    aim: float = 0.0
    own: bool = False
    quick: bool = False  # part of --quick
    lengths: tuple[int, ...] = ()  # per sequence; seqlen_k is the longest
    fp8: bool = False  # an e4m3 cache
    softcap: float = 0.0

    @property
    def name(self) -> str:
        shape = f"B{self.batch} {self.heads_q}/{self.heads_kv} D{self.head_dim}"
        mask = "causal" if self.causal else "full"
        if self.seqlen_q == self.seqlen_k and not self.page_size:
            return f"{shape} S{self.seqlen_q} {mask}"
        pages = f"page {self.page_size}" if self.page_size else "contiguous"
        before = self.seqlen_k - self.seqlen_q
        keys = f"{round(before / 1024)}k" if before >= 1000 else f"{self.seqlen_k}"
        return f"{shape} {self.seqlen_q} over {keys} {mask} {pages}"

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the mask keeps, over all sequences."""
        q = self.seqlen_q
        return sum(q * k - q * (q - 1) // 2 if self.causal else q * k for k in self.keys)

    @property
    def keys(self) -> tuple[int, ...]:
        return self.lengths or (self.seqlen_k,) * self.batch

    @property
    def flop(self) -> int:
        return 4 * self.pairs * self.heads_q * self.head_dim

    @property
    def bytes(self) -> int:
        """Bytes of q and out, and of K and V, each counted once."""
        queries = self.batch * self.seqlen_q * self.heads_q
        return 2 * self.head_dim * (2 * queries + (1 if self.fp8 else 2) * sum(self.keys) * self.heads_kv)


def same_length(group: str, batch: int, heads: tuple[int, int], dim: int, seqlen: int, **options) -> list[Workload]:
    causal = options.pop("causal", None)
    masks = (False, True) if causal is None else (causal,)
    return [Workload(group, batch, *heads, dim, seqlen, seqlen, mask, **options) for mask in masks]


def chunks(group: str, heads: tuple[int, int], dim: int, must: float, aim: float) -> list[Workload]:
    """New rows behind a long prefix, pages of 16."""

    def one(rows: int, prefix: int) -> Workload:
        quick = (rows, prefix) == (1024, 32)
        return Workload(group, 1, *heads, dim, rows, prefix * 1024 + rows, True, 16, must, aim, quick=quick)

    return [one(rows, prefix) for prefix in (32, 128) for rows in (512, 1024, 2048)]


def pages(heads: tuple[int, int], dim: int) -> list[Workload]:
    """The same keys in pages, compared with our own call on contiguous keys."""
    keys = 16 * 784 * 3  # a multiple of every page size, so that all layouts read the same amount
    group = "paged / contiguous"
    return [Workload(group, 1, *heads, dim, 1024, keys, True, size, 0.95, 0.98, own=True) for size in (0, 16, 64, 784)]


def short(seqlen: int) -> list[Workload]:
    quick = seqlen in (128, 1024)
    return same_length(SHORT, 1, (16, 8), 128, seqlen, causal=True, must=1.15, aim=1.40, quick=quick)


D128, LONG, SHORT = "D128 S4096", "D128 causal, long", "D128 causal, short, in a graph"
WORKLOADS: list[Workload] = [
    *same_length(D128, 4, (32, 8), 128, 4096, must=1.05, aim=1.20, quick=True),
    *same_length(LONG, 1, (16, 8), 128, 2048, causal=True, must=1.05, aim=1.20, quick=True),
    *same_length(LONG, 1, (16, 8), 128, 8192, causal=True, must=1.05, aim=1.20),
    *same_length(LONG, 1, (64, 8), 128, 16384, causal=True, must=1.05, aim=1.20),
    *(w for seqlen in (64, 128, 512, 1024) for w in short(seqlen)),
    *same_length("D64 S4096", 4, (32, 32), 64, 4096, must=1.05, aim=1.20, quick=True),
    *same_length("D256 S4096", 2, (16, 4), 256, 4096, must=1.05, aim=1.25, quick=True),
    *chunks("chunks, 64/8 D128", (64, 8), 128, 1.05, 1.20),
    *chunks("chunks, 16/2 D128", (16, 2), 128, 1.05, 1.20),
    *chunks("chunks, 32/2 D256", (32, 2), 256, 1.10, 1.30),
    *pages((64, 8), 128),
    *pages((16, 2), 128),
    *pages((32, 2), 256),
]

# Shown with --extra only: decode, verification and further head sizes.
EXTRA: list[Workload] = [
    *same_length("D96 S4096", 4, (32, 8), 96, 4096),
    *(Workload("decode", batch, *heads, 128, rows, keys * 1024, True, 16)
      for heads in ((64, 8), (16, 2)) for batch, keys in ((1, 8), (8, 8), (32, 8), (1, 128)) for rows in (1, 8)),
]  # fmt: skip
