"""`flashspark verify --vllm`: the installed vLLM's FLASH_ATTN backend on random batches, against the oracle.

    python -m flashspark.vllm.verify [--batches N] [--replays N] [--seed N] [--device cuda|cpu] [--verbose]

Each batch builds a layer with the implementation that the FLASH_ATTN slot gives, a cache in the release's layout with
shuffled pages, and a mixed batch with padded rows; forward's result is compared with the double-precision oracle. On a
GPU every forward runs under torch's sync_debug_mode("error"), and then again as a CUDA graph that is captured at the
largest lengths and replayed on other batches. Exit status: 0 all passed, 1 a batch is wrong, 2 nothing could be run.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

from .names import FLASH_ATTN, SELECTOR

BOUND = {"bfloat16": (1e-2, 1e-2), "float16": (2e-3, 2e-3)}  # absolute, relative
ORACLE_WORK = 2 * 10**9  # the multiply-adds of one batch: the oracle needs about a second for them
POISON = 2**30  # a page number and a length that nothing may use


@dataclass
class Layer:
    """The properties that a layer and its batches share."""

    heads: int
    heads_kv: int
    head_dim: int
    dtype: str
    page: int
    window: int | None
    softcap: float
    sinks: bool
    causal: bool
    slots: int  # sequences a batch may hold
    longest_q: int
    longest_k: int
    cache: str  # vLLM's kv_cache_dtype

    def __str__(self) -> str:
        masks = [f"window {self.window}" if self.window else "", "softcap" if self.softcap else ""]
        masks += ["sinks" if self.sinks else "", "" if self.causal else "not causal"]
        masks += ["" if self.cache == "auto" else f"{self.cache} cache"]
        words = [f"{self.heads}/{self.heads_kv} heads, D {self.head_dim}, {self.dtype}, pages of {self.page}"]
        words += [f"{self.slots} x ({self.longest_q}, {self.longest_k})", *filter(None, masks)]
        return ", ".join(words)


def random_layer(rng: random.Random) -> Layer:
    heads, heads_kv = rng.choice([(4, 4), (8, 2), (16, 2), (9, 3), (8, 1), (32, 8)])
    longest_q = rng.choice([1, 1, 4, 8, 70])
    layer = Layer(
        heads=heads,
        heads_kv=heads_kv,
        head_dim=rng.choice([64, 64, 80, 96, 128, 128, 128, 192, 256, 256, 512]),
        dtype=rng.choice(["bfloat16", "bfloat16", "float16"]),
        page=rng.choice([16, 16, 32, 48, 128, 784]),
        window=rng.choice([None, None, 1, 17, 100]),
        softcap=rng.choice([0.0, 0.0, 0.0, 30.0]),
        sinks=rng.random() < 0.25,
        causal=rng.random() < 0.85,
        slots=rng.choice([1, 3, 8, 20]),
        longest_q=longest_q,
        longest_k=longest_q + rng.choice([0, 100, 900]),
        cache="auto",
    )
    if rng.random() < 0.3:
        layer.cache = "fp8"
    one = layer.heads * layer.longest_q * layer.longest_k * layer.head_dim
    layer.slots = max(1, min(layer.slots, ORACLE_WORK // one))
    return layer


class Batch:
    """The buffers of one layer. Their contents change in place from step to step, as a serving engine's do."""

    def __init__(self, layer: Layer, device: str, seed: int) -> None:
        import torch

        self.device, self.layer, self.rng = device, layer, random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype = getattr(torch, layer.dtype)
        self.width = -(-layer.longest_k // layer.page)
        self.rows = layer.slots * layer.longest_q
        self.pages = layer.slots * self.width + 1
        self.descale = 1.0 if layer.cache == "auto" else 0.5  # of k and v
        self.whole, self.k, self.v = self._cache(device)
        fused = torch.zeros(self.rows, layer.heads + 2 * layer.heads_kv, layer.head_dim, dtype=self.dtype)
        self.q = fused.to(device)[:, : layer.heads]
        self.out = torch.empty(self.rows, layer.heads, layer.head_dim, dtype=self.dtype, device=device)
        self.cu = torch.zeros(layer.slots + 1, dtype=torch.int32, device=device)
        self.used = torch.zeros(layer.slots, dtype=torch.int32, device=device)
        self.table = torch.zeros(layer.slots, self.width + 2, dtype=torch.int32, device=device)[:, : self.width]
        self.sinks = self._normal((layer.heads,)) if layer.sinks else None

    def _cache(self, device: str) -> Any:
        """A cache in the release's layout: (as vLLM passes it to forward, keys, values)."""
        import torch

        from .versions import cache_split

        backend = sys.modules[FLASH_ATTN].FlashAttentionBackend
        # vLLM keeps fp8 caches as bytes.
        dtype = self.dtype if self.layer.cache == "auto" else torch.uint8
        p, n, h, d = self.pages, self.layer.page, self.layer.heads_kv, self.layer.head_dim
        split = cache_split(backend)
        if split == "packed":
            whole = torch.zeros(p, n, h, 2 * d, dtype=dtype, device=device).permute(0, 2, 1, 3)
            return whole, *map(self._numbers, whole.transpose(1, 2).split(d, dim=-1))
        shape, axis = ((2, p, n, h, d), 0) if split == "unbind 0" else ((p, 2, n, h, d), 1)
        whole = torch.zeros(shape, dtype=dtype, device=device)
        return whole, *map(self._numbers, whole.unbind(axis))

    def _numbers(self, cache: Any) -> Any:
        import torch

        return cache if self.layer.cache == "auto" else cache.view(torch.float8_e4m3fn)

    def _normal(self, shape: Any) -> Any:
        import torch

        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def step(self) -> None:
        """Other lengths, pages and values. Slots behind the last sequence are padding with stale contents."""
        import torch

        layer, rng = self.layer, self.rng
        count = rng.randint(1, layer.slots)
        q_lens = [rng.randint(1, layer.longest_q) for _ in range(count)] + [0] * (layer.slots - count)
        k_lens = [rng.randint(n, layer.longest_k) if n else POISON for n in q_lens]
        order = rng.sample(range(self.pages), self.pages)
        table = torch.full((layer.slots, self.width), POISON, dtype=torch.int32)
        for b in range(count):
            for i in range(-(-k_lens[b] // layer.page)):
                table[b, i] = order.pop()
        ends = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
        self.total = int(ends[-1])
        for buffer, values in (
            (self.cu, ends),
            (self.used, torch.tensor(k_lens, dtype=torch.int32)),
            (self.table, table),
        ):
            buffer.copy_(values)
        for buffer in (self.q, self.k, self.v):
            buffer.copy_(self._normal(buffer.shape))
        self.out.fill_(float("nan"))

    def _descales(self) -> dict[str, Any]:
        import torch

        if self.layer.cache == "auto":
            return {}
        factors = torch.full((self.layer.slots, self.layer.heads_kv), self.descale)
        return {"k_descale": factors, "v_descale": factors}

    def wrong(self) -> str:
        """What differs from the oracle; "" if nothing does."""
        import flashspark

        layer = self.layer
        left = layer.window - 1 if layer.window else -1
        right = left if not layer.causal else 0 if layer.window else -1
        want = flashspark.flash_attn_varlen_func(
            self.q.cpu(), self.k.cpu(), self.v.cpu(), self.cu.cpu(), None, layer.longest_q, layer.longest_k,
            softmax_scale=layer.head_dim**-0.5, causal=layer.causal, window_size=(left, right), softcap=layer.softcap,
            block_table=self.table.cpu(), seqused_k=self.used.cpu(), implementation="cpu-reference",
            sinks=None if self.sinks is None else self.sinks.cpu(), **self._descales(),
        )[: self.total].float()  # fmt: skip
        got = self.out[: self.total].cpu().float()
        if bool(got.isnan().any()):
            return f"{int(got.isnan().sum())} NaN"
        absolute, relative = BOUND[layer.dtype]
        over = (got - want).abs() / (absolute + relative * want.abs())
        worst = float(over.max())
        return f"error is {worst:.2g} times the bound" if worst > 1 else ""


def prepare(device: str) -> str:
    """Imports vLLM's attention and takes it over; returns what prevents that, or ""."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU: flashspark verify (without --vllm) checks the CPU"
    importlib.import_module(SELECTOR)
    importlib.import_module(FLASH_ATTN)
    from . import register, takeover

    register()
    return "" if takeover.State.active else f"vLLM keeps its own attention: {takeover.State.reason}"


def implementation(layer: Layer, batch: Batch) -> Any:
    """The layer's implementation, from the FLASH_ATTN slot."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionBackendEnum.FLASH_ATTN.get_class()
    return backend.get_impl_cls()(
        num_heads=layer.heads, head_size=layer.head_dim, scale=layer.head_dim**-0.5, num_kv_heads=layer.heads_kv,
        alibi_slopes=None, sliding_window=layer.window, kv_cache_dtype=layer.cache,
        logits_soft_cap=layer.softcap or None, sinks=batch.sinks,
    )  # fmt: skip


def metadata(batch: Batch) -> Any:
    """FlashAttentionMetadata of the installed release, with the bounds of a captured batch."""
    cls, layer = sys.modules[FLASH_ATTN].FlashAttentionMetadata, batch.layer
    values = {
        "num_actual_tokens": batch.rows, "max_query_len": layer.longest_q, "query_start_loc": batch.cu,
        "max_seq_len": layer.longest_k, "seq_lens": batch.used, "block_table": batch.table, "slot_mapping": batch.used,
        "use_cascade": False, "common_prefix_len": 0, "cu_prefix_query_lens": None, "prefix_kv_lens": None,
        "suffix_kv_lens": None, "causal": layer.causal,
    }  # fmt: skip
    known = {f.name for f in fields(cls)}
    if not layer.causal and "sliding_window" in known and layer.window:
        values["sliding_window"] = (layer.window - 1, layer.window - 1)
    return cls(**{name: value for name, value in values.items() if name in known})


def check(layer: Layer, device: str, seed: int, replays: int) -> str:
    """Runs one layer; returns what is wrong, or ""."""
    import torch

    batch = Batch(layer, device, seed)
    impl, given = implementation(layer, batch), metadata(batch)
    one = torch.ones((), device=device)
    holder = types.SimpleNamespace(_q_scale=one, _k_scale=one * batch.descale, _v_scale=one * batch.descale)

    def forward() -> None:
        impl.forward(holder, batch.q, batch.q, batch.q, batch.whole, given, batch.out)

    batch.step()
    if device == "cuda":
        forward()  # loads the kernel
        torch.cuda.synchronize()
    with no_waiting() if device == "cuda" else nullcontext():
        forward()
    if text := batch.wrong():
        return text
    if device != "cuda" or not replays:
        return ""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    for number in range(replays):
        batch.step()
        graph.replay()
        if text := batch.wrong():
            return f"replay {number}: {text}"
    return ""


@contextmanager
def no_waiting() -> Iterator[None]:
    """Makes everything that waits for the GPU raise."""
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def supported(layer: Layer) -> bool:
    """Whether this release has such layers: only from 0.24 on may layers that are not causal have windows."""
    return layer.causal or not layer.window or hasattr(sys.modules[FLASH_ATTN], "_maybe_symmetrize_window")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--replays", type=int, default=3, help="of each batch's graph; GPU only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--verbose", action="store_true", help="a line for every batch")
    options = parser.parse_args()
    if reason := prepare(options.device):
        print(f"verify --vllm: {reason}")
        return 2
    import vllm

    failed = done = 0
    for number in range(options.seed, options.seed + options.batches):
        layer = random_layer(random.Random(number))
        if not supported(layer):
            continue
        text = check(layer, options.device, number, options.replays)
        done += 1
        failed += bool(text)
        if text or options.verbose:
            print(f"{'FAIL' if text else 'pass'} {number}: {layer}{': ' + text if text else ''}", flush=True)
    replays = f", {options.replays} graph replays each" if options.device == "cuda" else ""
    print(f"vLLM {vllm.__version__}: {done} layers{replays}, {failed} failed")
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
