"""Every feature with every dtype and head size, on small shapes."""

from __future__ import annotations

import zlib
from dataclasses import replace

import flashspark
import pytest
import torch
from oracle import attend, failures, poison_unseen
from problem import Spec, build

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The head sizes that kernels are built for, and some in between.
DIMS = [(64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512)]
ODD_DIMS = [
    (59, 59),
    (60, 111),
    (111, 60),
    (300, 129),
    (8, 8),
    (40, 24),
    (104, 104),
    (128, 64),
    (64, 128),
    (160, 160),
    (248, 248),
    (320, 256),
    (504, 512),
]

MIXED = {"q_lens": [1, 7, 0, 130, 33], "k_lens": [300, 65, 20, 130, 1000]}
FEATURES: dict[str, dict] = {
    "causal": {},
    "full": {"causal": False},
    "more queries than keys": {"q_lens": [90, 40, 3], "k_lens": [50, 0, 2]},
    "more queries than keys, full": {"q_lens": [90, 40, 3], "k_lens": [50, 0, 2], "causal": False},
    "causal_per_seq": {"causal_per_seq": True},
    "window": {"window": (40, 0)},
    "window, full": {"window": (70, 17), "causal": False},
    "window to the right": {"window": (-1, 5), "causal": False},
    "window of one key": {"window": (0, 0)},
    "softcap": {"softcap": 12.0, "scale": 4.0},
    "sinks": {"sinks": torch.float32},
    "sinks in 16 bits": {"sinks": torch.bfloat16, "window": (30, 0)},
    "alibi": {"alibi": 1},
    "alibi per sequence, full": {"alibi": 2, "causal": False},
    "relative bias": {"rel_extent": 50},
    "relative bias, long": {"rel_extent": 900, "causal": False},
    "ranges": {"prefix": "per_seq"},
    "ranges, window": {"prefix": "per_seq", "window": (60, 0)},
    "ranges, clamped": {"prefix": "per_seq", "window": (60, 0), "clamp": True},
    "ranges per token": {"prefix": "per_token"},
    "ranges per token, clamped": {"prefix": "per_token", "window": (25, 0), "clamp": True},
    "rswa": {"rswa": 48},
    "chunks": {"chunk": 50},
    "chunks, full, window": {"chunk": 37, "causal": False, "window": (60, 9)},
    "chunks, ranges": {"chunk": 128, "prefix": "per_seq"},
    "e4m3 result": {"e4m3_out": True},
    "leftpad": {"leftpad": True},
    "seqused_q": {"seqused_q": True},
    "no lse": {"lse": False},
    "sharp softmax": {"scale": 12.0},
    "flat softmax": {"scale": 0.01},
    "gqa 8": {"heads": (8, 1)},
    "gqa 3": {"heads": (9, 3)},
    "mha": {"heads": (3, 3)},
    "16 query heads a key head": {"heads": (16, 1)},
    "loose bounds": {"loose_bounds": True},
    "everything": {
        **{"heads": (6, 2), "window": (90, 0), "softcap": 20.0, "sinks": torch.float32, "alibi": 2, "rel_extent": 64},
        **{"prefix": "per_seq", "clamp": True, "causal_per_seq": True, "seqused_q": True, "leftpad": True},
    },
}
LAYOUTS: dict[str, dict] = {
    "pages of 16": {},
    "pages of 48": {"page_size": 48},
    "pages of 64": {"page_size": 64},
    "pages of 784": {"page_size": 784},
    "pages of 1": {"page_size": 1},
    "pages of 4": {"page_size": 4, "cache": "packed"},
    "pages of 20, full": {"page_size": 20, "cache": "heads_first", "causal": False},
    "pages of 100, batch index": {"page_size": 100, "batch_index": True},
    "whole table": {"whole_table": True, "k_lens": [300] * 5},
    "whole table, batch index": {"whole_table": True, "batch_index": True, "page_size": 20},
    "packed": {"cache": "packed"},
    "packed, pages of 784": {"cache": "packed", "page_size": 784},
    "planes": {"cache": "planes"},
    "heads first": {"cache": "heads_first", "page_size": 32},
    "shared pages": {"shared_prefix": True, "q_lens": [4, 9, 1, 20], "k_lens": [400, 333, 500, 350]},
    "fused q": {"fused_q": True},
    "varlen": {"layout": "varlen"},
    "varlen, packed, seqused_k": {"layout": "varlen", "cache": "packed", "seqused_k": True},
    "dense": {"layout": "dense"},
    "dense, equal": {"layout": "dense", "q_lens": [70] * 3, "k_lens": [190] * 3},
    "dense, batch index": {"layout": "dense", "batch_index": True, "cache": "heads_first"},
    "dense, leftpad": {"layout": "dense", "leftpad": True, "seqused_q": True, "seqused_k": True},
    "dense q, pages": {"layout": "dense_paged"},
}
# Problems to run with splits: few rows over many keys, and others.
SPLITS: dict[str, dict] = {
    "decode": {"q_lens": [1, 1, 1], "k_lens": [2000, 17, 900]},
    "verify": {"q_lens": [5, 0, 8], "k_lens": [1500, 400, 1203]},
    "mixed": MIXED,
    "windows": {"q_lens": [3, 40], "k_lens": [1800, 700], "window": (200, 0)},
    "sinks": {"q_lens": [1, 2], "k_lens": [1100, 900], "sinks": torch.float32},
    "everything": {**MIXED, **FEATURES["everything"]},
    "no keys": {"q_lens": [2, 3], "k_lens": [0, 0]},
    "chunks": {"q_lens": [1, 4], "k_lens": [1900, 1000], "chunk": 700},
    "pages of 3": {"q_lens": [1, 1, 6], "k_lens": [1700, 20, 400], "page_size": 3},
    "e4m3 result": {"q_lens": [1, 5], "k_lens": [1500, 300], "e4m3_out": True},
    "e4m3 result and cache": {"q_lens": [1, 5], "k_lens": [1500, 300], "e4m3_out": True, "fp8": "kv"},
    "all e4m3": {"q_lens": [2, 1], "k_lens": [900, 1400], "e4m3_out": True, "fp8": "qkv"},
}


def check(spec: Spec, device: torch.device, seed: str) -> None:
    problem = build(spec, zlib.crc32(seed.encode()), device)
    poison_unseen(problem)
    out, lse = problem.run()
    found = failures(problem, out, lse)
    assert not found, f"{found}\n{problem.explain()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature, dims, dtype, device):
    spec = Spec(**{**MIXED, "dims": dims, "dtype": DTYPES[dtype], **FEATURES[feature]})
    check(spec, device, f"{feature} {dims} {dtype}")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256), (512, 512)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, dims, device):
    for dtype in DTYPES.values():
        check(Spec(**{**MIXED, "dims": dims, "dtype": dtype, **LAYOUTS[layout]}), device, f"{layout} {dims} {dtype}")


FP8_DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512)]


@pytest.mark.parametrize("fp8", ["kv", "qkv"])
@pytest.mark.parametrize("dims", FP8_DIMS, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_fp8_features(feature, dims, fp8, device):
    """K and V in e4m3 with descale factors; queries in 16 bits or e4m3."""
    dtype = DTYPES["bf16" if len(feature) % 2 else "fp16"]
    check(Spec(**{**MIXED, **FEATURES[feature]}, dims=dims, dtype=dtype, fp8=fp8), device, f"{feature} {dims} {fp8}")


@pytest.mark.parametrize("dims", FP8_DIMS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_layouts(layout, dims, device):
    check(Spec(**{**MIXED, **LAYOUTS[layout]}, dims=dims, fp8="kv"), device, f"{layout} {dims} fp8")


@pytest.mark.parametrize("num_splits", [1, 3])
def test_every_e4m3_number(num_splits, device):
    """All 254 finite e4m3 codes, in K and in V."""
    problem = build(Spec([40, 3, 1], [200, 90, 400], (2, 2), (64, 64), fp8="kv", num_splits=num_splits), 5, device)
    codes = torch.tensor([c for c in range(256) if c % 128 != 127], dtype=torch.uint8, device=device)
    numbers = codes.view(torch.float8_e4m3fn).to(problem.k.dtype)
    for x in (problem.k, problem.v):
        shape = x.shape
        x.copy_(numbers[torch.randint(len(numbers), (x.numel(),), device=device)].view(shape))
    problem.options["softmax_scale"] = 0.002  # keeps the scores within a few units
    poison_unseen(problem)
    assert not failures(problem, *problem.run())


@pytest.mark.parametrize("dims", ODD_DIMS, ids=str)
def test_head_dims_between(dims, device):
    for dtype in DTYPES.values():
        for feature in ({}, {"causal": False, "cache": "packed"}, {"softcap": 9.0}):
            check(Spec(**{**MIXED, "dims": dims, "dtype": dtype, **feature}), device, f"{dims} {dtype} {feature}")


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 8, 40])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256), (512, 512)], ids=str)
@pytest.mark.parametrize("shape", SPLITS)
def test_splits(shape, dims, num_splits, device):
    for lse in (True, False):
        spec = Spec(**{"dims": dims, "num_splits": num_splits, "lse": lse, **SPLITS[shape]})
        check(spec, device, f"{shape} {dims} {lse}")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_tile_edges(dims, causal, device):
    """Lengths around every multiple that a tile size could have."""
    edges = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257]
    pairs = [(q, k) for q in edges for k in edges]
    for start in range(0, len(pairs), 54):
        q_lens, k_lens = (list(x) for x in zip(*pairs[start : start + 54]))
        check(Spec(q_lens, k_lens, (2, 1), dims, causal=causal), device, f"{start} {dims}")


# The CPU engine's exponential turns NaN scores into numbers; the kernels must not.
@pytest.mark.parametrize("value", ["q", "v", pytest.param("k", marks=pytest.mark.needs_gpu)])
def test_nan_in_the_inputs(value, device):
    """A NaN that a query sees reaches the results that depend on it, and no others."""
    problem = build(Spec([40, 3], [200, 90], (2, 2), (128, 128), causal=False), 5, device)
    poison_unseen(problem)
    if value == "q":
        problem.q[7, 1, 3] = float("nan")
    else:
        page = int(problem.host["page_table"][0, 5])
        (problem.k if value == "k" else problem.v)[page, 2, 1, 9] = float("nan")
    answer = attend(problem)
    if value == "q":  # the oracle skips NaN rows of q, since unused rows hold NaN
        answer.exact[7, 1], answer.exact_lse[7, 1] = float("nan"), float("nan")
    expected = {"q": 128, "k": 40 * 128, "v": 40}[value]
    assert int(answer.exact.isnan().sum()) == expected
    out, lse = problem.run()
    assert not failures(problem, out, lse, answer)


def test_empty_problems(device):
    """No sequences, no rows, no keys."""
    q, k = (torch.randn(n, 2, 64, device=device).bfloat16() for n in (5, 0))
    lengths = torch.zeros(3, dtype=torch.int32, device=device)
    out = torch.full_like(q, float("nan"))
    flashspark.flash_attn_varlen_func(q, k, k, lengths, lengths, 1, 1, out=out)
    assert out.isnan().all()
    covered = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    _, lse = flashspark.flash_attn_varlen_func(q, k, k, covered, lengths, 3, 0, out=out, return_softmax_lse=True)
    assert (out == 0).all() and (lse == -float("inf")).all()
    nothing = q[:0]
    assert flashspark.flash_attn_varlen_func(nothing, k, k, lengths[:1], lengths[:1], 0, 0).shape == nothing.shape


def test_infinite_biases(device):
    """A row whose scores are all -inf counts as a fully masked row."""
    problem = build(Spec([3], [20], (2, 1), rel_extent=64), 3, device)
    poison_unseen(problem)
    problem.options["rel_logits"][1] = -float("inf")
    out, lse = problem.run()
    assert (out[1] == 0).all() and (lse[:, 1] == -float("inf")).all()
    assert not failures(problem, out, lse)


def test_scales_of_16_bit_tensors_are_ignored(device):
    """vLLM passes descale factors of 1.0 with strides of 0; only float8 tensors use them."""
    problem = build(Spec(**MIXED), 9, device)
    poison_unseen(problem)
    scale = torch.ones(1, device=device).expand(5, 2)
    plain, _ = problem.run()
    scaled, _ = problem.run(q_descale=scale, k_descale=scale, v_descale=scale)
    assert torch.equal(plain.nan_to_num(), scaled.nan_to_num())


@pytest.mark.parametrize("num_splits", [1, 3])
def test_strided_results(num_splits, device):
    """out may be a slice of wider rows, and lse may have any strides; elements in between are unchanged."""
    problem = build(Spec(**{**MIXED, "dims": (128, 128), "num_splits": num_splits}), 17, device)
    poison_unseen(problem)
    rows = len(problem.q)
    wide = torch.full((rows, 5, 160), 7.0, dtype=torch.bfloat16, device=device)
    out = wide[:, 1:, 16:144]
    lse = torch.full((rows, 8), 7.0, device=device)
    problem.run(out, lse[:, ::2].T)
    assert not failures(problem, out, lse[:, ::2].T)
    out.fill_(7), lse[:, ::2].fill_(7)
    assert (wide == 7).all() and (lse == 7).all()


# name: (problem, arguments under which a correct kernel computes what a faulty one would).
FAULTS: dict[str, tuple[dict, dict]] = {
    "a key too few": ({"window": (40, 0)}, {"window_size": (39, 0)}),
    "a key too many": ({"window": (500, 0)}, {"window_size": (501, 0)}),
    "not causal": ({}, {"causal": False}),
    "scale": ({}, {"softmax_scale": 0.126}),
    "no softcap": ({"softcap": 12.0, "scale": 2.0}, {"softcap": 0.0}),
    "no sink": ({"sinks": torch.float32}, {"sinks": None}),
    "no ranges": ({"prefix": "per_seq"}, {"prefix_ranges": None}),
    "a longer chunk": ({"chunk": 50}, {"attention_chunk": 51}),
    "no chunk": ({"chunk": 500}, {"attention_chunk": 0}),
    "a key too few in R-SWA": ({"rswa": 48}, {"rswa_window": 47}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rule_notices(fault, device):
    """The error bound is tight enough to detect each of these faults."""
    options, changes = FAULTS[fault]
    problem = build(Spec(**{**MIXED, "poison_unkept": False, **options}), 1, device)
    problem.options.pop("softmax_scale", None)
    poison_unseen(problem)
    answer = attend(problem)
    assert not failures(problem, *problem.run(), answer)
    assert failures(problem, *problem.run(**changes), answer)


@pytest.mark.parametrize("kind", ["implementation", "num_splits"])
def test_errors(kind, device):
    """A bad argument is named, and nothing is computed."""
    problem = build(replace(Spec(**MIXED), causal=True), 11, device)
    out, lse = problem.empty_results()
    if kind == "implementation":
        with pytest.raises((ValueError, NotImplementedError), match="implementation"):
            problem.run(out, lse, implementation="no-such-kernel")
    else:
        with pytest.raises(ValueError, match="num_splits"):
            problem.run(out, lse, num_splits=-7)
    assert out.isnan().all()
