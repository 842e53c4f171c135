"""Count what the collectives of a rank receive from others, and the memory of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Forward
from lasp.state_exchange import strategies


class Received:
    """How many bytes so far."""

    bytes = 0


@contextmanager
def counted() -> Iterator[Received]:
    """Count the collectives that exchanges are made of."""
    received = Received()
    gather, single, receive = strategies.all_gather_into, dist.all_to_all_single, dist.recv

    def count_gather(output: Tensor, own: Tensor, **kwargs: Any) -> Any:
        received.bytes += output.nbytes - own.nbytes
        return gather(output, own, **kwargs)

    def count_single(
        output: Tensor,
        own: Tensor,
        sizes: list[int] | None = None,
        own_sizes: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        group = kwargs.get("group") or dist.group.WORLD
        shares = sizes or [1] * group.size()
        others = sum(shares) - shares[group.rank()]
        received.bytes += output.nbytes * others // max(sum(shares), 1)
        return single(output, own, sizes, own_sizes, **kwargs)

    def count_recv(output: Tensor, **kwargs: Any) -> Any:
        received.bytes += output.nbytes
        return receive(output, **kwargs)

    with (
        patch.object(strategies, "all_gather_into", count_gather),
        patch.object(dist, "all_to_all_single", count_single),
        patch.object(dist, "recv", count_recv),
    ):
        yield received


def measured_bytes(forward: Forward, leaves: list[Tensor], do: Tensor) -> dict[str, int]:
    """Bytes that this rank receives, by direction; on GPUs the memory of both directions too."""
    on_gpu = do.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with counted() as received:
        output = forward(*leaves)
        sizes = {"forward_bytes": received.bytes}
        gradients = torch.autograd.grad(output, leaves, do)
        sizes["backward_bytes"] = received.bytes - sizes["forward_bytes"]
    if on_gpu:
        torch.cuda.synchronize()
        results = output.nbytes + sum(x.nbytes for x in gradients)
        sizes["extra_bytes"] = torch.cuda.max_memory_allocated() - before - results
    return sizes
