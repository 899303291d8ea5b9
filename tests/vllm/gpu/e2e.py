"""Real vLLM on a GPU: stock attention and flashspark's on the same requests, compared token by token.

    e2e.py run CASE OUT.json --model DIR [--tp N]      one engine; FLASHSPARK=0 in the environment makes it stock's
    e2e.py run .. --kernel NAME                        ours is a kernel of a Hugging Face repository: kernel_hook.py
    e2e.py compare STOCK.json OURS.json --model DIR    exit status 0: equal, but for near ties
    e2e.py model KIND DIR                              a small model with random weights: see models.py
    e2e.py cases                                       the names of the cases

Tokens must be equal, request by request, up to the first difference; there the stock run's two best logits must lie
within 0.3, which is how far bf16 attention moves them. What follows a difference is another text. On prompts far from
any text bf16 moves logits further: a wider gap is put to the same model in float32, without any of our code or vLLM's
(with an fp8 cache: with keys and values rounded to e4m3), and is wrong if that holds stock's token for better by 0.3
and more. An fp8 cache moves the logits of such prompts by more than that: there ours may be wrong as often as stock's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import random
import statistics
import sys
import time
from typing import Any

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__))]
import kernel_hook  # noqa: E402
import models  # noqa: E402

NEAR_TIE = 0.3
_GRAPH = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}
_FULL = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}
_NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
CASES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graph": {"compilation_config": _GRAPH},
    "default": {},
    "full": {"compilation_config": _FULL},  # mixed batches in graphs: releases whose class is ALWAYS
    "chunked": {"compilation_config": _GRAPH, "max_num_batched_tokens": 512, "enable_chunked_prefill": True},
    "prefix": {"compilation_config": _GRAPH, "enable_prefix_caching": True},
    "ngram": {"compilation_config": _GRAPH, "speculative_config": _NGRAM},
    "thousand": {"compilation_config": _GRAPH},
    "spawn": {"compilation_config": _GRAPH},  # the engine in a process of its own
    "pages": {"compilation_config": _GRAPH, "block_size": 48},
    "fp8": {"compilation_config": _GRAPH, "kv_cache_dtype": "fp8"},
    "two": {"compilation_config": _GRAPH},  # two engines in one process
}


def prompts(case: str, vocabulary: int) -> list[list[int]]:
    """Token ids, the same for all cases but two. Half of a prompt repeats a phrase, so that n-gram speculation has
    something to find."""
    rng = random.Random(case if case in ("thousand", "prefix") else "requests")
    count = 1000 if case == "thousand" else 64
    longest = 200 if case == "thousand" else 1400
    shared = [rng.randrange(100, vocabulary) for _ in range(400)]
    result = []
    for number in range(count):
        length = rng.choice([1, 3, 17, rng.randint(2, 300), rng.randint(2, longest)])
        phrase = [rng.randrange(100, vocabulary) for _ in range(rng.randint(1, 20))]
        body = [rng.randrange(100, vocabulary) for _ in range(length // 2)]
        body += (phrase * length)[: length - len(body)]
        result.append(shared + body if case == "prefix" and number % 2 else body)
    return result


def requests(case: str, model: str) -> list[dict[str, Any]]:
    """As vLLM takes them."""
    config = models.read_config(model)
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    asked = [{"prompt_token_ids": ids} for ids in prompts(case, vocabulary)]
    return models.with_images(asked) if "vision_config" in config else asked


ABOUT_ATTENTION = ("flashspark", "FlashAttention version", "ttention backend")


class Lines:
    """What the log says about attention, whichever handlers the engine leaves in place."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        make = logging.getLogRecordFactory()

        def note(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = make(*args, **kwargs)
            line = record.getMessage()
            if not line.startswith("non-default args") and any(word in line for word in ABOUT_ATTENTION):
                self.lines.append(line)
            return record

        logging.setLogRecordFactory(note)


def forbid_waiting() -> None:
    """Every attention call of flashspark's fails if it makes the host wait for the device."""
    import torch
    from flashspark.vllm import attention

    attend = attention._attend

    def strict(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return attend(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    attention._attend = strict


def run(case: str, out: str, model: str, tp: int, kernel: str | None = None) -> None:
    """kernel: the name of a Hugging Face repository, whose kernel serves through vLLM's FlashAttention 4."""
    ours = os.environ.get("FLASHSPARK") != "0"
    if kernel and ours:
        sys.exit("--kernel: needs FLASHSPARK=0, or an installed flashspark would take the calls over")
    hook = kernel_hook.install(kernel) if kernel else None
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if case == "spawn" or tp > 1 else "0"
    import torch
    import vllm

    log = Lines()
    config = models.read_config(model)
    if ours and case != "spawn" and tp == 1:
        forbid_waiting()
    arguments: dict[str, Any] = {
        "model": model, "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 64,
        "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 4 << 30, "seed": 0,
        "enable_prefix_caching": False, "tensor_parallel_size": tp,
        "disable_log_stats": True, **models.prepare(config), **CASES[case],
    }  # fmt: skip
    if hook:
        importlib.import_module(kernel_hook.TARGET)  # here, and not while a graph is being captured
        arguments["attention_config"] = {"flash_attn_version": 4}
    start = time.perf_counter()
    llm = vllm.LLM(**arguments)
    load = time.perf_counter() - start
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=24 if case == "thousand" else 48, ignore_eos=True, logprobs=2, detokenize=False
    )
    given = requests(case, model)
    llm.generate(given[:4], sampling, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(given, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    if torch.cuda.is_available() and tp == 1:
        torch.cuda.synchronize()  # a fault of any kernel shows here
    if case == "two":
        second = vllm.LLM(**arguments)
        both = [
            [list(o.outputs[0].token_ids) for o in e.generate(given, sampling, use_tqdm=False)] for e in (second, llm)
        ]
        if both[0] != both[1]:
            sys.exit("two: the engines of one process give different tokens")
    results = []
    for output in outputs:
        best = [sorted((x.logprob for x in step.values()), reverse=True) for step in output.outputs[0].logprobs]
        gaps = [round(b[0] - b[1], 4) for b in best]
        results.append(
            {"prompt": len(output.prompt_token_ids), "tokens": list(output.outputs[0].token_ids), "gaps": gaps}
        )
    tokens = sum(len(r["tokens"]) for r in results)
    report = {
        "case": case, "ours": ours or hook is not None, "tp": tp,
        "vllm": vllm.__version__, "torch": torch.__version__, "load_s": load,
        "gpu": torch.cuda.get_device_name(), "tokens_per_s": tokens / seconds, "log": log.lines, "results": results,
    }  # fmt: skip
    with open(out, "w") as file:
        json.dump(report, file)
    lacking = [kind for kind in models.served(config) if not any(f"flashspark: serves {kind}" in x for x in log.lines)]
    if ours and lacking and case != "spawn" and tp == 1:
        sys.exit(f"{case}: flashspark did not serve {lacking}: {log.lines}")
    # A model that needs vLLM's attention before its engine (see models.prepare) makes us say that we are switched off.
    if not ours and any(x.startswith("flashspark:") and "FLASHSPARK=0 is set" not in x for x in log.lines):
        sys.exit(f"{case}: FLASHSPARK=0, and yet: {log.lines}")
    if hook and not (hook.calls["prefill"] and hook.calls["decode"]):
        sys.exit(f"{case}: the kernel had the calls {dict(hook.calls)}: {log.lines}")
    who = f"{kernel}, {dict(hook.calls)} calls" if hook else "ours" if ours else "stock"
    print(f"E2E {case} {who}: {tokens} tokens, {tokens / seconds:.0f} tokens/s, loaded in {load:.0f} s")
    for line in log.lines if ours or hook else []:
        print(f"E2E   {line}")


def float32_logits(model: str, asked: list[tuple[dict[str, Any], list[int]]], cache: str) -> list[Any]:
    """Of the token behind each request and its text, by transformers' own arithmetic; cache: keys' and values' type."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def rounded(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        # bf16 on the way: so vLLM's layers hand them to the cache.
        k, v = (x.to(torch.bfloat16).to(torch.float8_e4m3fn).to(x.dtype) for x in (k, v))
        return eager_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register("eager_fp8", rounded)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = "eager_fp8" if cache == "fp8" else "eager"
    kind = AutoModelForImageTextToText if "vision_config" in models.read_config(model) else AutoModelForCausalLM
    network = kind.from_pretrained(model, dtype=torch.float32, attn_implementation=how).to(device)
    with torch.no_grad():
        inputs = [models.float32_inputs(model, *each) for each in asked]
        return [network(**{k: v.to(device) for k, v in x.items()}).logits[0, -1].cpu() for x in inputs]


def compare(stock_path: str, ours_path: str, model: str | None) -> int:
    with open(stock_path) as a, open(ours_path) as b:
        stock, ours = json.load(a), json.load(b)
    if stock["ours"] or not ours["ours"] or len(stock["results"]) != len(ours["results"]) or not stock["results"]:
        sys.exit(f"not comparable: {stock_path}, {ours_path}")
    equal, ties, wide = 0, [], []
    for number, (x, y) in enumerate(zip(stock["results"], ours["results"])):
        step = next((i for i, (s, t) in enumerate(zip(x["tokens"], y["tokens"])) if s != t), None)
        if len(x["tokens"]) != len(y["tokens"]) or x["prompt"] != y["prompt"]:
            sys.exit(f"request {number}: not the same prompt, or not as many tokens")
        if step is None:
            equal += 1
        elif x["gaps"][step] < NEAR_TIE:
            ties.append(x["gaps"][step])
        else:
            wide.append((number, step))
    lines, wrong, stock_wrong = [], 0, 0
    cache = CASES[stock["case"]].get("kv_cache_dtype", "auto")
    if wide and model:
        asked = requests(stock["case"], model)
        texts = [(asked[n], stock["results"][n]["tokens"][:step]) for n, step in wide]
        for (n, step), logits in zip(wide, float32_logits(model, texts, cache)):
            theirs, own = (float(logits[run["results"][n]["tokens"][step]]) for run in (stock, ours))
            wrong += theirs - own >= NEAR_TIE
            stock_wrong += own - theirs >= NEAR_TIE
            lines.append(
                f"E2E   request {n} ({stock['results'][n]['prompt']} prompt tokens), step {step}: stock's gap "
                f"{stock['results'][n]['gaps'][step]}; float32 gives stock's token {theirs:.3f}, ours {own:.3f}, "
                f"its best {float(logits.max()):.3f}"
            )
    elif wide:
        wrong = len(wide)
    allowed = stock_wrong if cache == "fp8" else 0
    speed = ours["tokens_per_s"] / stock["tokens_per_s"]
    widest = f", widest gap {max(ties):.2f}, median {statistics.median(ties):.2f}" if ties else ""
    cases = stock["case"] if stock["case"] == ours["case"] else f"{ours['case']} (stock: {stock['case']})"
    print(f"E2E {cases} vLLM {stock['vllm']} tp {stock['tp']}: {equal} of {len(stock['results'])} requests equal,")
    print(
        f"E2E   {len(ties)} differ at a near tie{widest}, {len(wide)} at a wider one, of which {wrong} WRONG "
        f"(stock's: {stock_wrong}); tokens/s ours/stock {speed:.2f}"
    )
    print("\n".join(lines[:8]) if lines else "", end="\n" if lines else "")
    return 1 if wrong > allowed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    one = sub.add_parser("run")
    one.add_argument("case", choices=CASES)
    one.add_argument("out")
    one.add_argument("--model", required=True)
    one.add_argument("--tp", type=int, default=1)
    one.add_argument("--kernel", metavar="NAME")
    two = sub.add_parser("compare")
    two.add_argument("stock")
    two.add_argument("ours")
    two.add_argument("--model", help="its folder: asked in float32 about the differences that are no near ties")
    three = sub.add_parser("model")
    three.add_argument("kind", choices=models.MODELS)
    three.add_argument("folder")
    sub.add_parser("cases")
    options = parser.parse_args()
    if options.what == "run":
        run(options.case, options.out, options.model, options.tp, options.kernel)
    elif options.what == "compare":
        return compare(options.stock, options.ours, options.model)
    elif options.what == "model":
        models.make_model(options.kind, options.folder)
    else:
        print(*CASES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
