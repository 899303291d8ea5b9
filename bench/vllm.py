"""Time of one step of the real vLLM by attention backend, on a GPU; dummy weights, 4 layers, little beside attention.

    bench/vllm.py run BACKEND MODEL OUT.json     one backend, in a process of its own
    bench/vllm.py table OUT.json ...             a markdown table of the reports, ours against the best of the others

BACKEND: flashspark, fa2, fa3, triton, flashinfer. MODEL: d128 (64/8 heads) or d256 (32/2 heads). fa2, triton and
flashinfer need what vLLM needs for them. Prefill: a prompt of 8192 tokens. Chunks: a prompt of 32768 in chunks of 512
and 2048, time of one chunk on average. Decode: one token of each of B sequences of 8192 tokens, in CUDA graphs.
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
CONTEXT, LONG, TOKENS = 8192, 32768, 32
VOCABULARY = 4096
_GRAPH = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 64]}


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
    def __init__(self, backend: str, folder: str, chunk: int) -> None:
        import vllm

        self.vllm, self.rng = vllm, random.Random(0)
        self.llm = vllm.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=LONG + 256,
            max_num_seqs=64, max_num_batched_tokens=chunk, enable_chunked_prefill=True, enable_prefix_caching=True,
            gpu_memory_utilization=0.8, compilation_config=_GRAPH, disable_log_stats=True, seed=0, **BACKENDS[backend],
        )  # fmt: skip

    def prompts(self, count: int, length: int) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": self.rng.choices(range(10, VOCABULARY), k=length)} for _ in range(count)]

    def seconds(self, given: list[dict[str, list[int]]], tokens: int) -> float:
        sampling = self.vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self.llm.generate(given, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def prefill(self, length: int) -> float:
        """Of one prompt that no cache holds."""
        return statistics.median(self.seconds(self.prompts(1, length), 1) for _ in range(RUNS + 1))

    def decode(self, count: int) -> float:
        """Of one token for each of `count` sequences, whose prompts are in the prefix cache."""
        given = self.prompts(count, CONTEXT)
        self.seconds(given, TOKENS + 1)
        long = statistics.median(self.seconds(given, TOKENS + 1) for _ in range(RUNS))
        short = statistics.median(self.seconds(given, 1) for _ in range(RUNS))
        return (long - short) / TOKENS


def run(backend: str, model: str, out: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if backend != "flashspark":
        os.environ["FLASHSPARK"] = "0"
    import torch

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config(model, folder)
        for chunk in (CONTEXT, 512, 2048):
            bench = Bench(backend, folder, chunk)
            if chunk == CONTEXT:
                found["prefill 8k"] = bench.prefill(CONTEXT)
                for count in (1, 8, 64):
                    found[f"decode B={count} at 8k"] = bench.decode(count)
            else:
                found[f"chunk of {chunk} over 32k"] = bench.prefill(LONG) / (LONG // chunk)
            del bench
            _release()
            print(f"BENCH {backend} {model}", {k: f"{v * 1e3:.3f} ms" for k, v in found.items()}, flush=True)
    import vllm

    report = {"backend": backend, "model": model, "seconds": found, "vllm": vllm.__version__}
    Path(out).write_text(json.dumps(report | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))


def _release() -> None:
    """Gives the memory of a deleted engine back, so that the next one finds it."""
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
    for model in HEADS:
        mine = {r["backend"]: r["seconds"] for r in reports if r["model"] == model}
        for step in next(iter(mine.values()), {}):
            times = [mine.get(name, {}).get(step) for name in names]
            cells = ["-" if t is None else f"{t * 1e3:.3f}" for t in times]
            others = [t for name, t in zip(names, times) if t is not None and name != "flashspark"]
            ours = mine.get("flashspark", {}).get(step)
            ratio = f"{min(others) / ours:.2f}" if others and ours else "-"
            lines.append(f"| {model} | {step} | " + " | ".join([*cells, ratio]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    one = sub.add_parser("run")
    one.add_argument("backend", choices=BACKENDS)
    one.add_argument("model", choices=HEADS)
    one.add_argument("out")
    two = sub.add_parser("table")
    two.add_argument("reports", nargs="+")
    options = parser.parse_args()
    if options.what == "run":
        run(options.backend, options.model, options.out)
    else:
        print(table(options.reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
