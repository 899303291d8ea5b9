"""Decode and verification over a paged cache: flashspark beside the kernels that users would take instead.

    python bench/gpu/decode.py [--peers DIR --flashinfer] [--only PATTERN] [--grid all|main|quick] [--out DIR]

One process, the same tensors for all, each in CUDA graphs that go through several caches, together larger than L2. The
table gives microseconds, the share of the read bandwidth measured on the spot and the ratio to the best peer. FA3 and
FlashInfer in one process hang at the first replay: --leave-out one of them at a time, and --read joins the two runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from decode_report import complete, join, table, write_pictures
from workloads import Workload

HEADS = ((64, 8, 128), (32, 8, 128), (16, 2, 128), (32, 2, 256), (16, 1, 256), (16, 8, 64), (8, 1, 512))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
KEYS = (512, 2048, 8192, 32768, 131072)
QUERIES = (2, 4, 8, 16)
MOST_BYTES = 9 << 30  # size limit of one cache: two of them and the peers' scratch must fit


def one(group: str, heads: tuple[int, int, int], batch: int, keys: int, **more: Any) -> Workload:
    return Workload(group, batch, *heads, more.pop("queries", 1), keys, True, more.pop("page", 16), **more)


def skewed(heads: tuple[int, int, int], long: int, batch: int, short: int) -> Workload:
    return one("one long, many short", heads, batch, long, lengths=(long, *(short,) * (batch - 1)))


def grid(kind: str) -> list[Workload]:
    """all: every batch and context for every head configuration; main: a coarser grid; quick: a few of them."""
    heads = HEADS if kind != "quick" else (HEADS[0], HEADS[2], HEADS[3])
    batches = {"all": BATCHES, "main": (1, 2, 8, 32, 128), "quick": (1, 8, 32)}[kind]
    keys = KEYS if kind == "all" else (2048, 8192, 32768)
    works = [one("decode", h, b, k) for h in heads for b in batches for k in keys]
    verify = [(b, k) for b in (1, 8, 32) for k in (2048, 8192)] if kind != "quick" else [(8, 8192)]
    chosen = heads if kind == "all" else heads[:1] + heads[2:4]
    works += [one("verify", h, b, k, queries=q) for h in chosen for b, k in verify for q in QUERIES]
    works += [one("pages of 64", h, b, k, page=64) for h in chosen for b, k in verify]
    works += [skewed(h, 131072, 64, 512) for h in heads] + [skewed(h, 32768, 16, 1024) for h in heads]
    plane = [w for w in works if w.group == "decode" and (kind == "all" or (w.batch in (1, 8, 32, 128)))]
    works += [replace(w, group="fp8 cache", fp8=True) for w in plane]
    works += [replace(w, group="softcap", softcap=30.0) for w in plane if w.seqlen_k in (2048, 8192)]
    return [w for w in works if w.bytes <= MOST_BYTES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="DIR")
    parser.add_argument("--flashinfer", action="store_true")
    parser.add_argument("--only", metavar="PATTERN", help="rows whose name or group this regular expression finds")
    parser.add_argument("--grid", choices=["all", "main", "quick"], default="main")
    parser.add_argument("--leave-out", action="append", default=[], metavar="PEER", help="not to time; repeatable")
    parser.add_argument("--budget", type=float, default=0.06, help="seconds of graph replays a row (0.06)")
    parser.add_argument("--label", default="decode", help="name of the files written")
    parser.add_argument("--commit", default="", help="of the source, for the report; default: git's")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument(
        "--read",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="no run: the table and the pictures of earlier ones, joined",
    )
    args = parser.parse_args()
    if args.read:
        document = join([json.loads(path.read_text()) for path in args.read])
    else:
        document = run(args)
        if document is None:
            print("bench/gpu/decode.py: torch sees no GPU")
            return 2
    complete(document)
    text = table(document)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.label}.json").write_text(json.dumps(document, separators=(",", ":")) + "\n")
        (args.out / f"{args.label}.md").write_text(text + "\n")
        write_pictures(document, args.out, args.label)
    return 0


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    import measure
    import peers
    import torch

    if not torch.cuda.is_available():
        return None
    torch.manual_seed(0)
    makers: measure.Makers = {"flashspark": peers.ours} | peers.load(args.peers, args.flashinfer)
    for name in ("torch FA2", *args.leave_out):  # torch's FA2 has no paged KV
        makers.pop(name, None)
    document: dict[str, Any] = {
        **{
            "machine": measure.gpu_facts(),
            "commit": args.commit or measure.git_commit(),
            "read_gb_per_s": measure.read_gb_per_s(),
        },
        **{"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "rows": [], "left_out": {}},
    }
    works = [w for w in grid(args.grid) if not args.only or re.search(args.only, f"{w.group} {w.name}")]
    measure.measure_all(works, lambda _: makers, "flashspark", args.budget, document)
    return document


if __name__ == "__main__":
    sys.exit(main())
