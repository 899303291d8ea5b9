"""Time of one step of the real vLLM by attention backend, on a GPU; dummy weights, 4 layers, little beside attention.

    bench/vllm.py run BACKEND MODEL OUT.json [--cache fp8]
                                         one backend, in a process of its own
    bench/vllm.py table OUT.json ...     a markdown table of the reports, ours against the best of the others

BACKEND: flashspark, fa2, fa3, triton, flashinfer. MODEL: d128 (64/8 heads) or d256 (32/2 heads). fa2, triton and
flashinfer need what vLLM needs for them. Prefill: a prompt of 8192 tokens. Chunks: a prompt of 32768 in chunks of 512
and 2048, time of one chunk on average. Decode: a step that gives each of B sequences of 8192 tokens one more, in CUDA
graphs; verify: one that checks eight tokens of each (n-gram drafts). Prefill and chunks: medians; decode and verify:
the fastest of many steps, since a shared machine's host adds up to a millisecond to any of them, with every backend.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HEADS = {"d128": (64, 8, 128), "d256": (32, 2, 256)}
BACKENDS: dict[str, dict[str, Any]] = {
    "flashspark": {},
    "fa2": {"attention_config": {"backend": "FLASH_ATTN", "flash_attn_version": 2}},
    "fa3": {"attention_config": {"backend": "FLASH_ATTN", "flash_attn_version": 3}},
    "triton": {"attention_config": {"backend": "TRITON_ATTN"}},
    "flashinfer": {"attention_config": {"backend": "FLASHINFER"}},
}
RUNS = 5
CACHE_BYTES = 11 << 30  # 64 sequences of 8192 tokens with 8 KV heads of 128, and a reserve
CONTEXT, LONG, TOKENS = 8192, 32768, 32
VOCABULARY = 4096
# The n-gram proposer nearly always finds the last token in the prompt, so nearly every step verifies seven drafts.
_DRAFTS = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
_GRAPH = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 64, 512]}


def config(model: str, folder: str) -> None:
    heads, heads_kv, head_dim = HEADS[model]
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 4, "num_attention_heads": heads, "num_key_value_heads": heads_kv, "head_dim": head_dim,
        "max_position_embeddings": 65536, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    }  # fmt: skip
    Path(folder, "config.json").write_text(json.dumps(values))


class Bench:
    def __init__(self, backend: str, folder: str, chunk: int, cache: str, drafts: bool = False) -> None:
        import vllm

        self.vllm, self.rng, self.requests = vllm, random.Random(0), 0
        self.llm = vllm.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=LONG + 256,
            max_num_seqs=64, max_num_batched_tokens=chunk, enable_chunked_prefill=True, enable_prefix_caching=True,
            gpu_memory_utilization=0.2, kv_cache_memory_bytes=CACHE_BYTES, compilation_config=_GRAPH,
            disable_log_stats=True, seed=0, kv_cache_dtype=cache,
            speculative_config=_DRAFTS if drafts else None, **BACKENDS[backend],
        )  # fmt: skip

    def prompts(self, count: int, length: int) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": self.rng.choices(range(10, VOCABULARY), k=length)} for _ in range(count)]

    def seconds(self, given: list[dict[str, list[int]]], tokens: int) -> float:
        sampling = self.vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self.llm.generate(given, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def prefill(self, length: int) -> float:
        """Seconds to prefill one prompt that is not in the prefix cache."""
        return statistics.median(self.seconds(self.prompts(1, length), 1) for _ in range(RUNS + 1))

    def decode(self, count: int) -> float:
        """Seconds of a step that gives each of `count` sequences one token; their prompts are in the prefix cache."""
        given = self.prompts(count, CONTEXT)
        self.seconds(given, 1)
        steps: list[float] = []
        for _ in range(RUNS):
            sampling = self.vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
            for number, prompt in enumerate(given):
                self.requests += 1
                self.llm.llm_engine.add_request(f"{self.requests}-{number}", prompt, sampling)
            times = []
            while self.llm.llm_engine.has_unfinished_requests():
                start = time.perf_counter()
                self.llm.llm_engine.step()
                times.append(time.perf_counter() - start)
            steps += times[len(times) - TOKENS // 2 : -2]  # skip the steps that load the prompts
        return min(steps)


def run(backend: str, model: str, out: str, cache: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if backend != "flashspark":
        os.environ["FLASHSPARK"] = "0"
    import torch

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config(model, folder)
        for chunk, drafts in ((CONTEXT, False), (512, False), (2048, False), (CONTEXT, True)):
            bench = Bench(backend, folder, chunk, cache, drafts)
            if drafts:
                for count in (1, 8):
                    found[f"verify q=8, B={count} at 8k"] = bench.decode(count)
            elif chunk == CONTEXT:
                found["prefill 8k"] = bench.prefill(CONTEXT)
                for count in (1, 8, 64):
                    found[f"decode B={count} at 8k"] = bench.decode(count)
            else:
                found[f"chunk of {chunk} over 32k"] = bench.prefill(LONG) / (LONG // chunk)
            del bench
            _release()
            print(f"BENCH {backend} {model} {cache}", {k: f"{v * 1e3:.3f} ms" for k, v in found.items()}, flush=True)
    import vllm

    report = {"backend": backend, "model": model, "cache": cache, "seconds": found, "vllm": vllm.__version__}
    Path(out).write_text(json.dumps(report | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))


def _release() -> None:
    """Releases the memory of a deleted engine, so that the next one can use it."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def table(paths: list[str]) -> str:
    reports = [json.loads(Path(path).read_text()) for path in paths]
    names = [b for b in BACKENDS if any(r["backend"] == b for r in reports)]
    lines = [f"{reports[0]['gpu']}, vLLM {reports[0]['vllm']}, torch {reports[0]['torch']}; milliseconds a step", ""]
    lines += ["| model | step | " + " | ".join(names) + " | best other / flashspark |"]
    lines += ["|---|---" + "|---:" * len(names) + "|---:|"]
    for model, cache in dict.fromkeys((r["model"], r["cache"]) for r in reports):
        mine = {r["backend"]: r["seconds"] for r in reports if (r["model"], r["cache"]) == (model, cache)}
        label = model if cache == "auto" else f"{model}, {cache} cache"
        for step in next(iter(mine.values()), {}):
            times = [mine.get(name, {}).get(step) for name in names]
            cells = ["-" if t is None else f"{t * 1e3:.3f}" for t in times]
            others = [t for name, t in zip(names, times) if t is not None and name != "flashspark"]
            ours = mine.get("flashspark", {}).get(step)
            ratio = f"{min(others) / ours:.2f}" if others and ours else "-"
            lines.append(f"| {label} | {step} | " + " | ".join([*cells, ratio]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    one = sub.add_parser("run")
    one.add_argument("backend", choices=BACKENDS)
    one.add_argument("model", choices=HEADS)
    one.add_argument("out")
    one.add_argument("--cache", default="auto", help="vLLM's kv_cache_dtype")
    two = sub.add_parser("table")
    two.add_argument("reports", nargs="+")
    options = parser.parse_args()
    if options.what == "run":
        run(options.backend, options.model, options.out, options.cache)
    else:
        print(table(options.reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
