"""The attention calls of vLLM, through the names that it calls, on CPU tensors against the oracle."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import FA_UTILS, FLASH_ATTN, Context

sys.path.insert(1, str(Path(__file__).parents[1] / "python"))
from reference import Options, attend_varlen, close  # noqa: E402


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
    """As the backends see it."""
    return sys.modules[FA_UTILS].flash_attn_varlen_func(*args, **kwargs)


@dataclass
class Spec:
    """One call: what vLLM passes, and what the oracle needs to know of it."""

    q_lens: tuple[int, ...] = (1, 5, 1, 17)
    k_lens: tuple[int, ...] = (40, 5, 100, 60)
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    page: int = 16
    layout: str = "packed NHD"
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0
    sinks: torch.dtype | None = None
    scale: float | None = None
    fp8: str = ""  # "kv": bf16 q beside an e4m3 cache; "qkv"
    passed: dict[str, Any] = field(default_factory=dict)  # more arguments of the call
    options: dict[str, Any] = field(default_factory=dict)  # more of the oracle's


def cache(layout: str, pages: int, page: int, heads: int, dims: tuple[int, int], dtype: torch.dtype) -> Any:
    """(whole, k, v): a cache as vLLM allocates it, with its views (pages, page, heads, dim). NaN all over."""
    dim, width = dims[0], sum(dims)

    def nan(*shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan")).to(dtype)

    if layout.startswith("planes"):
        dim_first = layout == "planes 0"
        whole = nan(2, pages, page, heads, dim) if dim_first else nan(pages, 2, page, heads, dim)
        k, v = whole.unbind(0 if dim_first else 1)
        return whole, k, v
    # (pages, heads, page, 2 D) views of other physical orders; "L": layers side by side in one allocation.
    whole = {
        "packed NHD": lambda: nan(pages, page, heads, width).permute(0, 2, 1, 3),
        "packed HND": lambda: nan(pages, heads, page, width),
        "packed BLNHC": lambda: nan(pages, 3, page, heads, width)[:, 1].permute(0, 2, 1, 3),
        "packed BLHNC": lambda: nan(pages, 3, heads, page, width)[:, 1],
        "packed BHLNC": lambda: nan(pages, heads, 3, page, width)[:, :, 1],
        "packed LHBNC": lambda: nan(3, heads, pages, page, width)[1].permute(1, 0, 2, 3),
    }[layout]()
    k, v = whole.transpose(1, 2).split([dim, width - dim], dim=-1)
    return whole, k, v


@dataclass
class Call:
    """Tensors of a Spec; `ks`, `vs` are one array a sequence for the oracle."""

    spec: Spec
    q: torch.Tensor
    ks: list[torch.Tensor]
    vs: list[torch.Tensor]
    cu_q: torch.Tensor
    whole: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seqused: torch.Tensor
    table: torch.Tensor
    out: torch.Tensor
    sinks: torch.Tensor | None
    descales: dict[str, torch.Tensor]

    def expected(self, **changes: Any) -> Any:
        s = self.spec
        base = Options(
            softmax_scale=s.scale, causal=s.causal, left=s.window[0], right=s.window[1], softcap=s.softcap,
            sinks=None if self.sinks is None else self.sinks.float().numpy(),
        )  # fmt: skip
        values = {n: 0.5 for n in ("q_descale", "k_descale", "v_descale")} if s.fp8 else {}
        if s.fp8 == "kv":
            values["q_descale"] = 1.0
        each = [replace(base, **values)] * len(s.q_lens)
        for name, value in (s.options | changes).items():
            each = [replace(o, **{name: value[b] if isinstance(value, list) else value}) for b, o in enumerate(each)]
        wide = [[x.float().numpy() for x in xs] for xs in (self.ks, self.vs)]
        return attend_varlen(self.q.float().numpy(), *wide, self.cu_q.numpy()[: len(s.q_lens) + 1], each)

    def arguments(self) -> dict[str, Any]:
        """What FlashAttentionImpl.forward passes."""
        s = self.spec
        return {
            "q": self.q, "k": self.k, "v": self.v, "out": self.out, "cu_seqlens_q": self.cu_q,
            "max_seqlen_q": max(s.q_lens), "seqused_k": self.seqused, "max_seqlen_k": 4096,
            "softmax_scale": s.scale if s.scale is not None else s.dims[0] ** -0.5, "causal": s.causal,
            "alibi_slopes": None, "window_size": list(s.window), "block_table": self.table, "softcap": s.softcap,
            "scheduler_metadata": None, "fa_version": 4, "num_splits": 0, "s_aux": self.sinks,
            **self.descales, **s.passed,
        }  # fmt: skip

    def check(self, out: torch.Tensor, want: Any, lse: torch.Tensor | None = None, want_lse: Any = None) -> None:
        # e4m3 operands lose more than the result's own rounding.
        close(out.float().numpy(), want, dtype="float8_e4m3fn" if self.spec.fp8 else str(out.dtype)[6:])
        if lse is not None:
            assert lse.dtype == torch.float32 and lse.shape == want_lse.shape, (lse.dtype, lse.shape)
            close(lse.numpy(), want_lse, dtype="bfloat16", what="lse")


def build(spec: Spec, seed: int = 0) -> Call:
    """Two padded rows follow the sequences: no queries, stale lengths, garbage pages, as captured batches have them."""
    rng = torch.Generator().manual_seed(seed)
    hq, hk = spec.heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    kv_type = torch.float8_e4m3fn if spec.fp8 else spec.dtype
    q_type = torch.float8_e4m3fn if spec.fp8 == "qkv" else spec.dtype
    # q is a slice of a fused QKV projection: its rows are wider than its heads.
    q = normal(sum(spec.q_lens), hq + 2 * hk, spec.dims[0]).to(q_type)[:, :hq]
    ks, vs = ([normal(n, hk, d).to(kv_type) for n in spec.k_lens] for d in spec.dims)
    counts = [-(-n // spec.page) for n in spec.k_lens]
    order = torch.randperm(sum(counts) + 2, generator=rng).tolist()
    whole, k, v = cache(spec.layout, len(order), spec.page, hk, spec.dims, kv_type)
    table = torch.full((len(counts) + 2, max(counts) + 5), 2**30, dtype=torch.int32)
    for b, count in enumerate(counts):
        for n in range(count):
            table[b, n] = page = order.pop()
            for rows, paged in ((ks[b], k), (vs[b], v)):
                part = rows[n * spec.page : (n + 1) * spec.page]
                paged[page, : len(part)] = part
    ends = np.cumsum([0, *spec.q_lens, 0, 0])
    rows = len(counts) + 2
    sinks = None if spec.sinks is None else normal(hq).to(spec.sinks)
    scale = torch.tensor(0.5 if spec.fp8 else 1.0)
    descales = {f"{x}_descale": scale.expand(rows, hk) for x in "qkv" if spec.fp8 != "kv" or x != "q"}
    out = torch.full((len(q), hq, spec.dims[1]), float("nan"), dtype=spec.dtype)
    seqused = torch.tensor([*spec.k_lens, 2**30, 777], dtype=torch.int32)
    cu_q = torch.from_numpy(ends.astype(np.int32))
    return Call(spec, q, ks, vs, cu_q, whole, k, v, seqused, table[:, :-3], out, sinks, descales)


LAYOUTS = ("planes 0", "planes 1", *(f"packed {x}" for x in ("NHD", "HND", "BLNHC", "BLHNC", "BHLNC", "LHBNC")))
PAGED = {
    **{layout: Spec(layout=layout) for layout in LAYOUTS},
    **{f"head_dim {d}": Spec(dims=(d, d)) for d in (72, 80, 96, 128, 192, 256, 512)},
    "fp16": Spec(dtype=torch.float16),
    "pages of 784": Spec(page=784, k_lens=(900, 5, 785, 784)),
    "pages of 48": Spec(page=48),
    "one KV head": Spec(heads=(8, 1), layout="packed HND"),
    "decode": Spec(q_lens=(1,) * 5, k_lens=(1, 16, 17, 300, 64)),
    "verify": Spec(q_lens=(8, 8, 8), k_lens=(8, 50, 130)),
    "DFlash verify": Spec(q_lens=(8, 8, 8), k_lens=(8, 50, 130), causal=False),
    "DFlash verify, window": Spec(q_lens=(8, 8), k_lens=(50, 130), causal=False, window=(20, 20)),
    "cross attention": Spec(q_lens=(7, 1), k_lens=(33, 70), causal=False),
    "window": Spec(window=(15, 0)),
    "softcap": Spec(softcap=30.0),
    "sinks": Spec(sinks=torch.bfloat16),
    "float32 sinks and window": Spec(sinks=torch.float32, window=(15, 0)),
    "scale": Spec(scale=0.3),
    "five splits": Spec(passed={"num_splits": 5}),
    "DiffKV": Spec(dims=(192, 128), sinks=torch.bfloat16),
    "fp8 cache": Spec(fp8="kv"),
    "fp8": Spec(fp8="qkv"),
}


def paged(c: Context) -> str:
    """Decoder, cross-attention, DiffKV, draft and verify calls over every cache layout."""
    for name, spec in PAGED.items():
        call = build(spec)
        try:
            result = flash_attn_varlen_func(**call.arguments())
            assert result is call.out, "another tensor came back"
            call.check(call.out, call.expected()[0])
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    return f"{len(PAGED)} cases"


def per_request_causal(c: Context) -> None:
    """An int32 tensor beside causal, as 0.24 (False) and later releases (True) pass it."""
    for causal in (False, True):
        call = build(Spec(q_lens=(4, 9, 1), k_lens=(20, 9, 33)))
        dynamic = torch.tensor([1, 0, 1, 0, 1], dtype=torch.int32)
        flash_attn_varlen_func(**call.arguments() | {"causal": causal, "dynamic_causal": dynamic})
        call.check(call.out, call.expected(causal=[True, False, True])[0])


def cascade(c: Context) -> None:
    """A common prefix and the suffixes, merged by lse, are the whole."""
    page = 16
    call = build(Spec(q_lens=(1, 3, 2), k_lens=(70, 80, 90), page=page))
    tokens, prefix = len(call.q), 2 * page
    for b in range(1, 3):  # the same first pages for everyone
        call.table[b, :2] = call.table[0, :2]
        for xs in (call.ks, call.vs):
            xs[b][:prefix] = xs[0][:prefix]
    given = {n: v for n, v in call.arguments().items() if n not in ("out", "cu_seqlens_q", "seqused_k")}
    first, first_lse = flash_attn_varlen_func(
        **given | {"causal": False, "block_table": call.table[:1], "max_seqlen_q": tokens, "max_seqlen_k": prefix},
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32), seqused_k=torch.tensor([prefix], dtype=torch.int32),
        return_softmax_lse=True,
    )  # fmt: skip
    second, second_lse = flash_attn_varlen_func(
        **given | {"block_table": call.table[:3, 2:]}, cu_seqlens_q=call.cu_q[:4],
        seqused_k=call.seqused[:3] - prefix, return_softmax_lse=True,
    )  # fmt: skip
    want, want_lse = call.expected()
    lse = torch.logaddexp(first_lse, second_lse)
    parts = [x.float() * (y - lse).exp().t()[..., None] for x, y in ((first, first_lse), (second, second_lse))]
    call.check((parts[0] + parts[1]).to(torch.bfloat16), want, lse, want_lse)


def unpaged(c: Context) -> str:
    """Encoders, ViT, MLA prefill and its context chunks, DCP's query call: keys laid end to end."""
    cases = {
        **{f"ViT {d}": (Spec(dims=(d, d), heads=(4, 4), causal=False), True) for d in (64, 72, 80, 88, 128)},
        "encoder, window": (Spec(causal=False, window=(7, 7)), True),
        "MLA prefill": (Spec(dims=(192, 128), heads=(4, 4), scale=0.1), True),
        "MLA context chunk": (Spec(dims=(192, 128), heads=(4, 4), causal=False), False),
        "DCP query": (Spec(), True),
    }
    for name, (spec, same) in cases.items():
        call = build(replace(spec, k_lens=spec.q_lens if same else spec.k_lens))
        cu_q = call.cu_q[:-2]
        cu_k = cu_q if same else torch.from_numpy(np.cumsum([0, *spec.k_lens]).astype(np.int32))
        k = torch.cat(call.ks)
        # v is a slice of wider rows, as kv_b_proj's output gives it.
        v = torch.cat([torch.cat(call.vs), torch.full_like(k, float("nan"))], dim=-1)[..., : spec.dims[1]]
        out, lse = flash_attn_varlen_func(
            call.q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max(spec.q_lens), max_seqlen_k=256,
            dropout_p=0.0, softmax_scale=spec.scale, causal=spec.causal, window_size=list(spec.window), fa_version=4,
            return_softmax_lse=True,
        )  # fmt: skip
        try:
            call.check(out, *(call.expected()[:1]), lse, call.expected()[1])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return f"{len(cases)} cases"


def refusals(c: Context) -> None:
    """What would be wrong if ignored is refused, and the argument is named."""
    from flashspark import mods

    call = build(Spec())
    wrong = {
        "q_v": torch.zeros(1),
        "gather_kv_indices": torch.zeros(1),
        "block_sparse_tensors": object(),
        "cp_world_size": 2,
        "dropout_p": 0.5,
        "mask_mod": lambda *_: None,
        "an_argument_of_tomorrow": 3,
    }
    for name, value in wrong.items():
        try:
            flash_attn_varlen_func(**call.arguments() | {name: value})
        except NotImplementedError as error:
            assert name in str(error), error
        else:
            raise AssertionError(f"{name} was ignored")
    rswa = {"mask_mod": mods.RSwa(), "aux_tensors": [torch.zeros(6, dtype=torch.int32), torch.ones(1)]}
    try:
        flash_attn_varlen_func(**call.arguments() | rswa)
    except NotImplementedError as error:
        assert "R-SWA" in str(error), error
    else:
        raise AssertionError("a window was read from the device")
    harmless = {"q_v": None, "cp_world_size": 1, "cp_rank": 0, "an_argument_of_tomorrow": None}
    flash_attn_varlen_func(**call.arguments() | harmless)
    call.check(call.out, call.expected()[0])


def fake_tensors(c: Context) -> None:
    """Warm-ups trace the call with tensors that have no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(4, 4, 64, dtype=torch.bfloat16), torch.empty(8, 16, 2, 64, dtype=torch.bfloat16)
        lens = torch.empty(3, dtype=torch.int32)
        out = flash_attn_varlen_func(
            q=q, k=k, v=k, cu_seqlens_q=lens, seqused_k=lens[:2], max_seqlen_q=2, max_seqlen_k=64, fa_version=4,
            block_table=torch.empty(2, 4, dtype=torch.int32), causal=True,
        )  # fmt: skip
    assert out.shape == q.shape and type(out).__name__ == "FakeTensor"


def lines(c: Context) -> str:
    """One INFO line a kind of layer."""
    from flashspark.vllm import report

    found = [text for text in report._said if text.startswith("serves ")]
    assert any("head_dim 192/128, bfloat16, paged, causal, sinks; by cpu-engine" in text for text in found), found
    assert any("head_dim 80, bfloat16, unpaged, full; by" in text for text in found), found
    assert FLASH_ATTN in sys.modules
    return f"{len(found)} kinds"


CALLS = (paged, per_request_causal, cascade, unpaged, refusals, fake_tensors, lines)
