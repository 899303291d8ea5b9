"""What functions, block masks and dropout add to a call: flashspark beside itself without them, and beside torch.

    python bench/gpu/flex_costs.py [--only dropout|decode|masks|host|first ...] [--out DIR]

dropout   forward with dropout_p = 0.1 beside 0, and torch's SDPA (FA2's kernel) with both
decode    one query row a sequence, ALiBi as a function beside none, in CUDA graphs over caches larger than L2
masks     create_block_mask of 131072 x 131072 on the device
host      microseconds until a call returns, while the device is still working
first     seconds of the first call with a function: traced, compiled and run in a new process, with an empty cache
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashspark
import torch
import torch.nn.functional as F
from flex import microseconds
from measure import captured, host_call_us, take_turns, warm
from torch.nn.attention import SDPBackend, sdpa_kernel

Row = dict[str, Any]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def alibi_of(heads: int) -> Callable[..., Any]:
    slopes = torch.exp2(-8 * torch.arange(1, heads + 1, device="cuda") / heads)
    return lambda score, b, h, q, kv: score + slopes[h] * kv


def dropout(with_peer: bool = True) -> list[Row]:
    rows = []
    for batch, heads, heads_kv, tokens, width in ((4, 32, 8, 4096, 128), (1, 16, 16, 8192, 64), (1, 8, 8, 8192, 256)):
        q = randn(batch, tokens, heads, width)
        k, v = (randn(batch, tokens, heads_kv, width) for _ in range(2))
        theirs = [x.transpose(1, 2) for x in (q, k, v)]
        for causal in (False, True):
            row: Row = {"shape": f"B{batch} {heads}/{heads_kv} S{tokens} D{width}", "causal": causal}
            for name, p in (("plain", 0.0), ("dropout", 0.1)):
                row[name] = microseconds(lambda: flashspark.flash_attn_func(q, k, v, causal=causal, dropout_p=p))  # noqa: B023
                if not with_peer:
                    continue
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    row[f"torch {name}"] = microseconds(
                        lambda: F.scaled_dot_product_attention(  # noqa: B023
                            *theirs,  # noqa: B023
                            dropout_p=p,  # noqa: B023
                            is_causal=causal,  # noqa: B023
                            enable_gqa=heads != heads_kv,  # noqa: B023
                        )
                    )
            row["cost"] = row["dropout"] / row["plain"]
            if with_peer:
                row["ratio"] = row["torch dropout"] / row["dropout"]
            rows.append(row)
    return rows


def decode() -> list[Row]:
    heads, heads_kv, width, rows = 64, 8, 128, []
    alibi = alibi_of(heads)
    for batch in (1, 8):
        for keys in (2048, 8192, 32768):
            once = 4 * batch * keys * heads_kv * width
            sets = [
                (randn(batch, 1, heads, width), *(randn(batch, keys, heads_kv, width) for _ in range(2)))
                for _ in range(max(2, -(-(256 << 20) // once)))
            ]
            calls: dict[str, list[Callable[[], Any]]] = {
                "plain": [lambda x=x: flashspark.flash_attn_func(*x) for x in sets],
                "function": [
                    lambda x=[t.transpose(1, 2) for t in x]: flashspark.flex_attention(*x, alibi, enable_gqa=True)
                    for x in sets
                ],
            }
            graphs = {name: captured(list_, warm(list_)) for name, list_ in calls.items()}
            times = {name: 1e6 * statistics.median(t) for name, t in take_turns(graphs, 0.4).items()}
            rows.append({"batch": batch, "keys": keys, **times, "cost": times["function"] / times["plain"]})
    return rows


def masks() -> list[Row]:
    length = 131072
    documents = torch.arange(length, device="cuda", dtype=torch.int32) // 5000
    functions = {
        "causal": lambda b, h, q, k: q >= k,
        "window 4096": lambda b, h, q, k: (q >= k) & (q - k < 4096),
        "documents of 5000": lambda b, h, q, k: documents[q] == documents[k],
    }
    rows = []
    for name, function in functions.items():
        make = lambda: flashspark.create_block_mask(function, None, None, length, length, device="cuda")  # noqa: B023, E731
        rows.append({"mask": name, "ms": microseconds(make) / 1000})
    return rows


def host() -> list[Row]:
    q, k, v = (randn(4, 32, 1024, 128) for _ in range(3))
    dense = [x.transpose(1, 2) for x in (q, k, v)]
    alibi = alibi_of(32)
    mask = flashspark.create_block_mask(lambda b, h, q, k: (q >= k) | (k < 100), None, None, 1024, 1024, device="cuda")
    numbers = torch.ones(1 << 20, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "torch.add": lambda: numbers + numbers,
        "flash_attn_func": lambda: flashspark.flash_attn_func(*dense),
        "flash_attn_func, dropout": lambda: flashspark.flash_attn_func(*dense, dropout_p=0.1),
        "flex_attention": lambda: flashspark.flex_attention(q, k, v),
        "flex_attention, score_mod": lambda: flashspark.flex_attention(q, k, v, alibi),
        "flex_attention, block mask": lambda: flashspark.flex_attention(q, k, v, None, mask),
        "flex_attention, both": lambda: flashspark.flex_attention(q, k, v, alibi, mask),
    }
    for call in calls.values():
        call()
    return [{"call": name, "us": host_call_us(call)} for name, call in calls.items()]


FIRST = """
import time, torch, flashspark
q, k, v = (torch.randn(1, 8, {rows}, {width}, device="cuda", dtype=torch.bfloat16) for _ in range(3))
flashspark.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
slopes = torch.rand(8, device="cuda")
start = time.perf_counter()
flashspark.flex_attention(q, k, v, lambda s, b, h, i, j: s + slopes[h] * torch.tanh(s) * j)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first() -> list[Row]:
    rows = []
    for count in (1, 2000):
        for width in (64, 128, 256):
            with tempfile.TemporaryDirectory() as folder:
                program = FIRST.format(rows=count, width=width)
                environment = os.environ | {"FLASHSPARK_CACHE_DIR": folder}
                runs = [
                    float(subprocess.run([sys.executable, "-c", program], env=environment, **OUTPUT).stdout)
                    for _ in range(2)
                ]
            rows.append({"rows": count, "D": width, "compiled": runs[0], "cached": runs[1]})
    return rows


OUTPUT: dict[str, Any] = {"capture_output": True, "check": True, "text": True}
PARTS = {"dropout": dropout, "decode": decode, "masks": masks, "host": host, "first": first}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peers", type=Path, help=argparse.SUPPRESS)  # what tools/dev/gpu.sh passes to every bench
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    torch.manual_seed(0)
    found = {}
    for part in arguments.only:
        found[part] = dropout(not arguments.no_peer) if part == "dropout" else PARTS[part]()
        for row in found[part]:
            print(part, *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if arguments.out:
        (arguments.out / "flex_costs.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
