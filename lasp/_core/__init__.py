"""What ``lasp``, ``ring`` and ``moe_parallel`` share. It needs torch; triton where kernels run."""

import torch

# On the CPU torch computes these functions by MKL, which chooses a function's kernel in its first
# call. Threads that race there may compute with a kernel of half the digits, once
# (github.com/pytorch/pytorch/issues/188792). Here one thread makes the first call.
for _dtype in (torch.float32, torch.float64):
    for _function in (torch.exp, torch.log, torch.sin, torch.cos):
        _function(torch.ones(1, dtype=_dtype, device="cpu"))
