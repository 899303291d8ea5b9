"""One small case of each kernel, for compute-sanitizer. Each is checked against the oracle, on the CPU.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitizer_cases.py [NAME ...]

Names are those of the kernels (kernels.json), and of what else there is to see. With PYTORCH_NO_CUDA_MEMORY_CACHING=1
every tensor is an allocation of its own, so that memcheck sees what lies outside it.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flashspark
import numpy as np
import torch
from oracle import failures, poison_unseen
from problem import Problem, Spec, build, wild

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools/dev"))
from kernel_list import Kernel, kernel_list

PREFILL = Spec([200, 65, 0, 300] * 12, [330, 65, 9, 300] * 12, (8, 4))  # rows enough to fill the largest GPU's SMs
SHORT_Q = Spec([1, 5, 0, 40], [200, 70, 9, 40], (4, 2))
DECODE = Spec([1, 5, 0, 8], [200, 70, 9, 300], (4, 2))
VERIFY = Spec([1, 5, 0, 12], [200, 170, 9, 300], (4, 2))  # more rows than a decode tile has
WILD = ("contiguous", "combine", "shares", "scheduled", "pages of 5", "table by index", "rswa", "dense")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCORE_MODS = {"softcap": 20.0, "alibi": 1, "rel_extent": 40, "prefix": "per_seq", "window": (50, 0)}


# Kernels without a case of their name: the one that runs them, or why none does.
RUN_BY = {
    "attention_forward_quantize": "e4m3 result",
    "attention_schedule": "scheduled",
    "attention_block_tiles": "block lists",
    "attention_backward_sums": "attention_backward_d64_mod_bf16",
    "attention_backward_blocks": "backward functions",
    "attention_backward_clear": "backward functions",
    "attention_backward_round": "backward functions, deterministic",
    **{
        f"attention_backward_{part}_{dtype}": f"attention_backward_d64_{dtype}"
        for part in ("preprocess", "postprocess")
        for dtype in ("bf16", "fp16")
    },
}
# Kernels that are compiled at run time: the size of their blocks, if they have lists, and dropout_p.
FUNCTIONS = {"functions": (0, 0.0), "blocks of 128": (128, 0.0), "dropout": (0, 0.3)}
NEVER_RUN = {"mma_peak": "writes nothing, and the `flashspark` command alone launches it"}


def spec_of(kernel: Kernel) -> Spec:
    """What makes the host choose a kernel: many rows or few, and a score modification."""
    dims = (kernel.head_dim, kernel.head_dim_v)
    if kernel.score_mod != "native":
        shape = {"prefill": PREFILL, "decode": DECODE}.get(kernel.tiling, SHORT_Q)
        spec = replace(shape, dims=dims, num_splits=1)
    elif kernel.tiling == "prefill":
        spec = replace(SHORT_Q, dims=dims, num_splits=1, **SCORE_MODS)
    else:  # only through Stream-K
        shape = {"decode": DECODE}.get(kernel.tiling, VERIFY)
        spec = replace(shape, dims=dims, num_splits=0, **SCORE_MODS)
    return replace(spec, fp8="kv") if kernel.dtype == "e4m3" else replace(spec, dtype=DTYPES[kernel.dtype])


def cases() -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for kernel in kernel_list():
        if kernel.operation == "attention_forward":
            found[kernel.name] = spec_of(kernel)
        elif kernel.operation == "attention_forward_combine":
            lengths = [700, 300, 9, 400]
            found[kernel.name] = replace(
                SHORT_Q, dims=(128, 128), num_splits=3, k_lens=lengths, dtype=DTYPES[kernel.dtype]
            )
    combine = found["attention_forward_combine_bf16"]
    # CTAs that go through several row tiles, and row tiles that several CTAs meet in.
    found["shares"] = replace(DECODE, q_lens=[1, 0, 2] * 30, k_lens=[150, 7, 900] * 30, dims=(128, 128), num_splits=0)
    found["scheduled"] = replace(found["shares"], schedule="fresh")
    found["stale"] = replace(found["shares"], schedule="stale")
    found["contiguous"] = replace(SHORT_Q, dims=(128, 128), layout="varlen")
    found["dense"] = replace(PREFILL, dims=(128, 128), layout="dense", causal=False, sinks=torch.float32)
    found["rswa"] = replace(SHORT_Q, rswa=30)
    found["chunks"] = replace(SHORT_Q, chunk=50, dims=(128, 128))
    found["pages of 5"] = replace(SHORT_Q, page_size=5)
    found["pages of 5, decode"] = replace(found["shares"], page_size=5)
    found["table by index"] = replace(SHORT_Q, batch_index=True, whole_table=True, page_size=20)
    found["e4m3 result"] = replace(SHORT_Q, e4m3_out=True, dims=(128, 128))
    found["e4m3 result, combine"] = replace(combine, e4m3_out=True, fp8="kv")
    found["checked"] = replace(SHORT_Q, check=True, leftpad=True)
    for name in WILD:
        found[f"wild {name}"] = combine if name == "combine" else found[name]
    return found


def run_wild(problem: Problem, device: torch.device) -> None:
    """Metadata of no sense, four times: the sanitizer says what is wrong, or the next call does."""
    for turn in range(4):
        rng = np.random.default_rng(turn)
        host = {name: wild(rng, values, slice(None)) for name, values in problem.host.items()}
        moved = to_device(replace(problem, host=host), device)
        if problem.spec.schedule:  # the key fits, the numbers do not
            moved.metadata = to_device(problem, device).metadata
        try:
            moved.run(*[x if x is None else x.to(device) for x in problem.empty_results()])
        except ValueError:
            if device.type == "cuda":
                raise


def run_append(device: torch.device) -> list[str]:
    """append_kv with rotary embedding into pages, of 16 bits and of e4m3, beside the CPU's."""
    wrong = []
    for cache_type, step in ((torch.bfloat16, 0.008), (torch.float8_e4m3fn, 0.13)):
        torch.manual_seed(3)
        k, v, q = (torch.randn(3, 5, heads, 64).to(torch.bfloat16) for heads in (2, 2, 4))
        k_cache, v_cache = (torch.randn(12, 16, 2, 64).to(cache_type) for _ in range(2))
        lists = {
            "cache_seqlens": torch.tensor([0, 30, 17], dtype=torch.int32),
            "block_table": torch.randperm(12).int().view(3, 4),
            **{name: torch.randn(64, 16) for name in ("rotary_cos", "rotary_sin")},
        }
        ours = [x.to(device, copy=True) for x in (k, v, k_cache, v_cache, q)]
        flashspark.append_kv(k, v, k_cache, v_cache, q=q, **lists)
        flashspark.append_kv(*ours[:4], q=ours[4], **{name: x.to(device) for name, x in lists.items()})
        for name, got, want in zip(("k", "v", "q"), ours[2:], (k_cache, v_cache, q)):
            # Two products and a sum, rounded in another order: a step of the type at most.
            if not torch.allclose(got.cpu().float(), want.float(), rtol=0.008 if name == "q" else step, atol=1e-5):
                wrong.append(f"{name} of a {cache_type} cache")
    return wrong


def run_functions(device: torch.device, name: str) -> list[str]:
    """A kernel that is compiled at run time, beside the CPU engine in float32; with lists also what makes them."""
    block, dropout = FUNCTIONS[name]
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, heads, n, 64).to(torch.bfloat16) for heads, n in ((4, 70), (2, 200), (2, 200)))
    slopes, documents = torch.rand(4), torch.arange(200, dtype=torch.int32) // 48
    outs = []
    for where in (torch.device("cpu"), device):
        own_slopes, own_documents = slopes.to(where), documents.to(where)
        x = [each.float() if where.type == "cpu" else each.to(where) for each in (q, k, v)]

        def near(b, h, i, j):
            return (own_documents[i] == own_documents[j]) | (j < 3 * h)  # noqa: B023

        def bias(score, b, h, i, j):
            return score - own_slopes[h] * abs(i - j)  # noqa: B023

        if dropout > 0:
            swapped = [each.transpose(1, 2) for each in x]
            state = torch.tensor([11, 5]).to(where)
            out = flashspark.flash_attn_func(*swapped, dropout_p=dropout, rng_state=state).transpose(1, 2)
        else:
            lists = (
                flashspark.create_block_mask(near, None, 4, 70, 200, device=where, BLOCK_SIZE=block) if block else None
            )
            out = flashspark.flex_attention(*x, score_mod=bias, block_mask=lists, enable_gqa=True)
        outs.append(out.cpu().float())
    error = float((outs[0] - outs[1]).abs().max())
    return [f"out by {error}"] if not error < 0.03 else []


# The slopes' gradient also has the rounding of out, which the passes have each their own of.
SLOPES_ALLOWED = 0.06


def wrong_gradients(allowed: dict[str, float], want: list[torch.Tensor], got: list[torch.Tensor]) -> list[str]:
    """Those that differ by more than is allowed, as a part of the largest element."""
    errors = [float((x - y).abs().max() / x.abs().max()) for x, y in zip(want, got, strict=True)]
    return [
        f"d{name} by {error} of its largest"
        for (name, most), error in zip(allowed.items(), errors, strict=True)
        if not error < most
    ]


def run_backward_functions(device: torch.device, deterministic: bool = False) -> list[str]:
    """Gradients through a kernel that is compiled at run time, with lists and of what a function captures."""
    torch.manual_seed(4)
    shapes = ((2, 4, 70, 64), (2, 2, 200, 64), (2, 2, 200, 64), (2, 4, 70, 64))
    q, k, v, dout = (torch.randn(shape).to(torch.bfloat16) for shape in shapes)
    slopes, documents = torch.rand(4) / 16, torch.arange(200, dtype=torch.int32) // 48
    found = []
    for where in (torch.device("cpu"), device):
        own_documents = documents.to(where)
        inputs = [x.to(where, copy=True).requires_grad_() for x in (q, k, v, slopes)]

        def near(b, h, i, j):
            return (own_documents[i] == own_documents[j]) | (j < 3 * h)  # noqa: B023

        def bias(score, b, h, i, j):
            return score - inputs[3][h] * abs(i - j)  # noqa: B023

        lists = flashspark.create_block_mask(near, None, 4, 70, 200, device=where, BLOCK_SIZE=128)
        out = flashspark.flex_attention(*inputs[:3], score_mod=bias, block_mask=lists, enable_gqa=True)
        torch.use_deterministic_algorithms(deterministic)
        try:
            found.append([x.cpu().float() for x in torch.autograd.grad(out, inputs, dout.to(where))])
        finally:
            torch.use_deterministic_algorithms(False)
    return wrong_gradients({"q": 0.02, "k": 0.02, "v": 0.02, "slopes": SLOPES_ALLOWED}, *found)


def run_backward_beside(device: torch.device) -> list[str]:
    """The same beside built-in biases and a mask, with their gradients, in turns and not."""
    torch.manual_seed(7)
    q, dout = (torch.randn(2, 70, 4, 128).to(torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(2, 200, 2, 128).to(torch.bfloat16) for _ in range(2))
    slopes, rel, table = 0.1 * torch.rand(4), torch.randn(2, 70, 4, 60), torch.randn(200)
    ranges = torch.tensor([[[0, 90], [150, 170]], [[-1, -1], [20, 199]]], dtype=torch.int32)
    wrong = []
    for deterministic in (False, True):
        found = []
        for where in (torch.device("cpu"), device):
            inputs = [x.to(where, copy=True).requires_grad_() for x in (q, k, v, slopes, rel)]
            numbers = table.to(where)
            out = flashspark.flash_attn_func(
                *inputs[:3], causal=True, alibi_slopes=inputs[3], rel_logits=inputs[4], prefix_ranges=ranges.to(where),
                score_mod=lambda s, b, h, i, j, lengths, aux: s * 0.9 + aux[0][j], aux_tensors=[numbers],
                mask_mod=lambda b, h, i, j, lengths, aux: (i + j) % 5 != 0, deterministic=deterministic,
            )  # fmt: skip
            found.append([x.cpu().float() for x in torch.autograd.grad(out, inputs, dout.to(where))])
        allowed = {"q": 0.02, "k": 0.02, "v": 0.02, "slopes": SLOPES_ALLOWED, "rel": 0.02}
        wrong += [f"{x}{', deterministic' if deterministic else ''}" for x in wrong_gradients(allowed, *found)]
    return wrong


def run_block_lists(device: torch.device) -> list[str]:
    """Lists of blocks that no tile fits, for all heads together and for each, beside the CPU's."""
    wrong = []
    torch.manual_seed(5)
    q, k, v = (torch.randn(2, heads, 130, 64).to(torch.bfloat16) for heads in (4, 2, 2))
    for heads, size in ((None, 48), (4, (16, 80))):
        mask = flashspark.create_block_mask(
            lambda b, h, i, j: (i + 20 >= j) & (j % 5 != h), 2, heads, 130, 130, device="cpu", BLOCK_SIZE=size
        )
        ours = [x.to(device) for x in (q, k, v)]
        want = flashspark.flex_attention(q.float(), k.float(), v.float(), block_mask=mask, enable_gqa=True)
        got = flashspark.flex_attention(*ours, block_mask=mask.to(device), enable_gqa=True)
        if not torch.allclose(got.cpu().float(), want, rtol=0.01, atol=0.02):
            wrong.append(f"blocks of {size}, lists for {heads or 1} heads")
    return wrong


def backward_results(
    device: torch.device, kernel: Kernel, varlen: bool, deterministic: bool, forward_results: tuple
) -> tuple[dict, str, tuple]:
    """Gradients by name, what ran, and out and lse of the forward pass, if forward_results has none.

    Where gradients need not be deterministic, heads of a group are of several CTAs.
    """
    torch.manual_seed(6)
    # At 128 columns and more with blocks of rows that no mask touches.
    heads, heads_kv, tokens, keys = 4, 2, 170 if kernel.head_dim >= 128 else 70, 200
    shapes = [(tokens, heads, kernel.head_dim), *[(keys, heads_kv, kernel.head_dim)] * 2]
    rows = [torch.randn(shape).to(DTYPES[kernel.dtype]) for shape in (*shapes, shapes[0])]
    slopes, rel = 0.1 * torch.randn(heads), torch.randn(tokens, heads, 60)
    q, k, v, dout, rel = (x.to(device, copy=True) if varlen else x.to(device, copy=True)[None] for x in (*rows, rel))
    options: dict[str, Any] = {"causal": varlen, "deterministic": deterministic}
    wanted = ["q", "k", "v"]
    if kernel.score_mod == "native":
        options |= {"softcap": 20.0, "dropout_p": 0.3, "rng_state": (11, 5), "attention_chunk": 150}
        options |= {"alibi_slopes": slopes.to(device), "rel_logits": rel}
        wanted += ["rel_logits", "alibi_slopes"]
    elif kernel.score_mod == "dropout":
        options |= {"dropout_p": 0.3, "rng_state": (11, 5)}
    lengths: tuple = ()
    forward, backward = flashspark.flash_attn_func, flashspark.flash_attn_backward
    if varlen:
        lists = [torch.tensor(x, dtype=torch.int32).to(device) for x in ([0, 5, tokens], [0, 9, keys])]
        lengths = (*lists, tokens, keys)
        forward, backward = flashspark.flash_attn_varlen_func, flashspark.flash_attn_varlen_backward
    # Gradients are of the out that they are given, whose rounding others would see.
    out, lse = forward_results or forward(q, k, v, *lengths, return_softmax_lse=True, **options)
    given = (dout, q, k, v, out.to(device), lse.to(device), *lengths)
    results = backward(*given, wanted=wanted, **options)
    return dict(zip(wanted, results)), backward(*given, wanted=wanted, explain=True, **options), (out, lse)


def run_backward(device: torch.device, kernel: Kernel) -> list[str]:
    """Gradients beside the CPU's, of packed sequences and of dense ones, where the host takes this kernel."""
    wrong, taken = [], device.type == "cpu"
    for varlen, deterministic in ((False, False), (False, True), (True, False), (True, True)):
        if deterministic and kernel.score_mod == "dropout":
            continue  # another instance's
        shape = f"{'varlen' if varlen else 'dense'}{', deterministic' if deterministic else ''}"
        exact, _, forward_results = backward_results(torch.device("cpu"), kernel, varlen, deterministic, ())
        results, explained, _ = backward_results(device, kernel, varlen, deterministic, forward_results)
        if device.type != "cpu" and not re.search(rf"\b{kernel.name}\b", explained):
            continue  # one that sums dq in another order
        taken = True
        for name, want in exact.items():
            error = float((want.float() - results[name].cpu().float()).abs().max() / want.float().abs().max())
            if not error < 0.02:
                wrong.append(f"d{name} by {error} of its largest, {shape}")
    return wrong if taken else ["the host takes other kernels"]


# Cases that are no Spec.
OTHERS = {
    "append_kv": run_append,
    "block lists": run_block_lists,
    "backward functions": run_backward_functions,
    "backward functions, deterministic": partial(run_backward_functions, deterministic=True),
    "backward functions beside biases": run_backward_beside,
}
OTHERS |= {name: partial(run_functions, name=name) for name in FUNCTIONS}
OTHERS |= {
    kernel.name: partial(run_backward, kernel=kernel)
    for kernel in kernel_list()
    if kernel.operation == "attention_backward"
}


def to_device(problem: Problem, device: torch.device) -> Problem:
    """The same problem on the GPU, by copies alone: none of torch's kernels runs under the sanitizer."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().to(device)

    options = {name: copy(x) if isinstance(x, torch.Tensor) else x for name, x in problem.options.items()}
    lists = {name: torch.from_numpy(values).to(device) for name, values in problem.host.items()}
    moved = replace(
        problem, q=copy(problem.q), k=copy(problem.k), v=copy(problem.v), options=options, device=lists, metadata=None
    )  # fmt: skip
    moved.reschedule()
    return moved


def names_kernel(chosen: str, kernel: Kernel) -> bool:
    """Whether explain's line, which names the instance, "d128_decode" or "d128_decode_e4m3", may mean this kernel."""
    if not kernel.instance:
        return "splits" in chosen
    suffix = "_e4m3" if kernel.dtype == "e4m3" else ""
    return re.search(rf"\b{kernel.instance}{suffix}\b", chosen) is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    table, kernels = cases(), {kernel.name: kernel for kernel in kernel_list()}
    names = args.names or [*table, *OTHERS]
    if args.list:
        print("\n".join(names))
        return 0
    wrong = 0
    for name in names:
        if name in OTHERS:
            found = OTHERS[name](torch.device(args.device))
            wrong += bool(found)
            print(f"{name:14} {'wrong: ' + str(found) if found else 'right'}", flush=True)
            continue
        spec = table[name]
        problem = build(spec, 1, "cpu")
        poison_unseen(problem)
        if name.startswith("wild "):
            run_wild(problem, torch.device(args.device))
            print(f"{name:14} ran", flush=True)
            continue
        results = problem.empty_results()
        moved = to_device(problem, torch.device(args.device))
        on_device = [x.to(args.device) for x in results]
        moved.run(*on_device)
        found = failures(problem, *(x.cpu() for x in on_device))
        chosen = " ".join(line for line in moved.explain().splitlines() if "chosen" in line)
        if args.device == "cuda" and name in kernels and not names_kernel(chosen, kernels[name]):
            found = [*found, "another kernel ran"]
        wrong += bool(found)
        print(f"{name:14} {'wrong: ' + str(found) if found else 'right'}", flush=True)
        print(f"               {chosen}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
