"""flashspark's CUDA kernels against the attention kernels that users would take instead, on this machine's GPU.

    python bench/gpu [--peers DIR [--flashinfer]] [--quick] [--only PATTERN] [--label NAME] [--out DIR]
    python bench/gpu --merge a.json b.json --out DIR        the second run's own columns beside the first's

One process, the same tensors for all, in turns; graph times count. FlashInfer compiles its kernels at first use, about
a minute: --compile-flashinfer does that alone, in the background of something else.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flashspark
import measure
import peers
import report
import torch
from measure import Makers
from tensors import Inputs, make
from workloads import EXTRA, WORKLOADS, Workload

HOST_CALL = Workload("host", 4, 16, 8, 128, 1, 1024, True)
HOST_CALL_PAGED = Workload("host", 4, 16, 8, 128, 1, 1024, True, 16)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with site/ and vLLM's FA2 and FA3 extensions")
    parser.add_argument("--flashinfer", action="store_true", help="time FlashInfer, too")
    parser.add_argument("--compile-flashinfer", action="store_true", help="only compile FlashInfer's kernels")
    parser.add_argument("--quick", action="store_true", help="one or two workloads of each row")
    parser.add_argument("--extra", action="store_true", help="also decode, verification and other head sizes")
    parser.add_argument("--only", metavar="PATTERN", help="workloads whose name or group this regular expression finds")
    parser.add_argument("--no-peers", action="store_true", help="flashspark alone")
    parser.add_argument("--implementation", metavar="NAME", help="one of flashspark.implementations(), by force")
    parser.add_argument("--num-splits", type=int, default=0)
    parser.add_argument("--label", default="flashspark", help="name of our column")
    parser.add_argument(
        "--leave-out", action="append", default=[], metavar="PEER", help="a peer not to time; repeatable"
    )
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of graph replays a workload (default 0.5)")
    parser.add_argument("--commit", default="", help="of the source, for the report; default: git's")
    parser.add_argument("--merge", type=Path, nargs=2, metavar="JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write LABEL.json, .md and .svg there")
    parser.add_argument("--require", action="store_true", help="exit 1 if a row misses its must")
    return parser.parse_args()


COMPILE = """
import sys
import torch
sys.path[:0] = [{here!r}]
sys.path.append({site!r})
import peers
from tensors import make
from workloads import Workload
for page_size in (0, 16):
    peers.flashinfer(make(Workload("", 1, 8, 8, {dim}, 64, 64, True, page_size), torch.device("cuda")))()
torch.cuda.synchronize()
"""


def compile_flashinfer(folder: Path, works: list[Workload]) -> None:
    """Compiles each head size in its own process and leaves the result in FlashInfer's cache. Head sizes found there
    are skipped."""
    start = time.monotonic()
    here, site = str(Path(__file__).parent), folder / "site"
    dims = {w.head_dim for w in works if not w.own}
    dims -= {d for d in dims if list(site.glob(f"flashinfer/data/aot/*_bf16_*_head_dim_qk_{d}_*/*.so"))}
    running = {
        dim: subprocess.Popen(
            [sys.executable, "-c", COMPILE.format(here=here, site=str(site), dim=dim)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for dim in sorted(dims)
    }  # fmt: skip
    for dim, process in running.items():
        _, errors = process.communicate()
        if process.returncode != 0:
            print(f"FlashInfer did not compile for D = {dim}: {errors[-600:]}", flush=True)
    if running:
        print(f"FlashInfer's kernels for D = {sorted(dims)}: {time.monotonic() - start:.0f} s", flush=True)


def host_calls(makers: Makers) -> dict[str, float]:
    """Host overhead of a small decode step, contiguous and paged. A torch call is listed to show how fast the host
    is."""
    x = torch.zeros(4096, device="cuda")
    found = {"torch.add(x, x, out=x)": measure.host_call_us(lambda: torch.add(x, x, out=x))}
    for name, maker in makers.items():
        for work, layout in ((HOST_CALL, ""), (HOST_CALL_PAGED, ", paged")):
            try:
                found[name + layout] = measure.host_call_us(maker(make(work, torch.device("cuda"))))
            except Exception as error:  # noqa: BLE001 - a peer without this call, or one that fails
                print(f"no host time: {name}{layout}: {error!r:.120}", flush=True)
    return found


def write(document: dict[str, Any], name: str, folder: Path | None) -> None:
    text = report.table(document)
    print(text)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
    if drawing := report.plot(document):
        (folder / f"{name}.svg").write_text(drawing)


def main() -> int:
    args = options()
    if args.merge:
        first, second = (json.loads(path.read_text()) for path in args.merge)
        write(report.join(first, second), "merged", args.out)
        return 0
    if not torch.cuda.is_available():
        print("bench/gpu: torch sees no GPU")
        return 2
    works = WORKLOADS + (EXTRA if args.extra else [])
    works = [w for w in works if not args.quick or w.quick]
    works = [w for w in works if not args.only or re.search(args.only, w.name) or re.search(args.only, w.group)]
    if not works:
        print(f"bench/gpu: no workload matches {args.only!r}")
        return 2
    start = time.monotonic()
    torch.manual_seed(0)
    if (args.flashinfer or args.compile_flashinfer) and args.peers:
        compile_flashinfer(args.peers, works)
        if args.compile_flashinfer:
            return 0

    def own(x: Inputs) -> peers.Call:
        return peers.ours(x, implementation=args.implementation, num_splits=args.num_splits)

    makers: Makers = {args.label: own}
    if not args.no_peers:
        makers |= peers.load(args.peers, args.flashinfer)
        makers = {name: maker for name, maker in makers.items() if name not in args.leave_out}
    machine = measure.gpu_facts()
    document: dict[str, Any] = {
        **{"machine": machine, "flashspark": flashspark.native_version(), "ours": [args.label]},
        **{"implementation": args.implementation, "num_splits": args.num_splits},
        **{"commit": args.commit or measure.git_commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
        **{"mma_peak_tflops": measure.mma_peak_tflops(), "copy_gb_per_s": measure.copy_gb_per_s()},
        **{"rows": [], "left_out": {}},
    }
    # A workload that is compared with our own contiguous call needs no peers.
    measure.measure_all(works, lambda w: {args.label: own} if w.own else makers, args.label, args.budget, document)
    document["host_call_us"] = host_calls(makers)
    document["first_call_ms"] = measure.first_call_ms()
    document["machine"] |= {f"{key} after": measure.gpu_facts().get(key) for key in ("clocks.sm", "temperature.gpu")}
    report.complete(document)
    write(document, args.label, args.out)
    print(f"{time.monotonic() - start:.0f} s in all")
    if args.require and report.missed(document):
        print("below their must:\n  " + "\n  ".join(report.missed(document)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
