"""Consistency checks: do the ranks of a group hold the same batch?

They run where a batch is made, never in a layer.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import torch
import torch.distributed as dist

from lasp._core.collectives import all_gather

DIGEST_BYTES, MESSAGE_BYTES = 8, 128


def check_same_on_ranks(
    what: str, numbers: Iterable[int], description: str, group: dist.ProcessGroup, fix: str
) -> None:
    """Raise ValueError on every rank of ``group`` unless all hold the same numbers.

    Args:
        what: they are, named in the error.
        numbers: of this rank.
        description: of this rank's numbers, in ASCII; cut off where the message ends.
        group: who must agree; every rank must call this.
        fix: how to make them equal, named in the error.

    Communication: one all-gather of 128 bytes a rank, and a wait for it.
    """
    digest = hashlib.blake2b(array("q", numbers).tobytes(), digest_size=DIGEST_BYTES).digest()
    text = description.encode("ascii", "replace")[: MESSAGE_BYTES - DIGEST_BYTES]
    message = bytearray(digest + text.ljust(MESSAGE_BYTES - DIGEST_BYTES))
    mine = torch.frombuffer(message, dtype=torch.uint8).to(_device_of(group))
    ranks_with: dict[bytes, list[int]] = {}
    for rank, row in enumerate(all_gather(mine, group).tolist()):
        ranks_with.setdefault(bytes(row), []).append(rank)
    if len({held[:DIGEST_BYTES] for held in ranks_with}) > 1:
        held = "; ".join(
            f"ranks {ranks} hold {message[DIGEST_BYTES:].decode('ascii').rstrip()}"
            f" (digest {message[:DIGEST_BYTES].hex()})"
            for message, ranks in ranks_with.items()
        )
        raise ValueError(f"{what} must be equal on every rank of the group, got {held}: {fix}")


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group takes messages: the host if it can."""
    backends = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    if "cpu:" in backends:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
