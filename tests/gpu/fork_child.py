"""Uses flashspark on a GPU, forks, and prints the error that the child raises. Run by test_graphs.py."""

import os
import sys

import flashspark
import torch

x = torch.randn(1, 4, 2, 64, device="cuda").bfloat16()
out = torch.empty_like(x)
flashspark.flash_attn_func(x, x, x, out=out)
torch.cuda.synchronize()

child = os.fork()
if child == 0:
    status = 1
    try:
        flashspark.flash_attn_func(x, x, x, out=out)
        print("the call in the forked child raised nothing")
    except RuntimeError as error:
        print(error)
        status = 0
    sys.stdout.flush()
    os._exit(status)
_, status = os.waitpid(child, 0)
# The parent still works.
flashspark.flash_attn_func(x, x, x, out=out)
torch.cuda.synchronize()
sys.exit(os.waitstatus_to_exitcode(status))
