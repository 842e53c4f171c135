"""Start the ranks of an example: the same few lines in each."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist


def init_distributed() -> torch.device:
    """Make the default group and return this rank's device.

    NCCL if there is a GPU for every rank of this host, else gloo on the CPU; every rank decides
    alike. Under torchrun its ranks, without it one rank.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= local_ranks:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
        dist.init_process_group(backend, init_method=rendezvous, rank=0, world_size=1)
    return device
