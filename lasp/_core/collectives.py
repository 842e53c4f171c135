"""Collectives under one name in every torch."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

# Renamed in torch 2.13, which warns about the old name.
all_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[...]`` of every rank as ``[ranks, ...]``."""
    if group is None:
        return x.unsqueeze(0)
    gathered = x.new_empty(group.size(), *x.shape)
    # Not to a list of tensors: NCCL would gather elsewhere and copy a rank's at a time.
    all_gather_into(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered
