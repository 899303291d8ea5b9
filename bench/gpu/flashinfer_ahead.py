"""Compiles FlashInfer's kernels on a machine without a GPU, so that the GPU machine need not spend minutes on it.

    python bench/gpu/flashinfer_ahead.py PEERS OUT [--arch 9.0a] [--dims 64 128 256]

PEERS: the folder with site/. Needs torch, nvcc, ninja and what FlashInfer imports (requests, click, tqdm, ...). OUT
gets one library per head size; put it at site/flashinfer/data/aot/NAME/NAME.so, where FlashInfer looks first.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("peers", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--arch", default="9.0a")
parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
args = parser.parse_args()

os.environ["FLASHINFER_CUDA_ARCH_LIST"] = args.arch  # read when flashinfer is imported
sys.path.append(str(args.peers / "site"))
import torch  # noqa: E402
from flashinfer.jit import gen_batch_prefill_module  # noqa: E402

args.out.mkdir(parents=True, exist_ok=True)
for dim in args.dims:
    types = (torch.bfloat16,) * 3  # q, kv, out
    # No positional encoding, sliding window, softcap or 16-bit accumulation, as peers.py plans its calls.
    spec = gen_batch_prefill_module("fa2", *types, torch.int32, dim, dim, 0, False, False, False)
    spec.build(verbose=False)
    shutil.copy(spec.jit_library_path, args.out)
    print(args.out / spec.jit_library_path.name, flush=True)
