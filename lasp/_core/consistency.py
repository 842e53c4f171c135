"""Consistency checks: do the ranks of a group hold the same batch, and call an operator alike?

Batches are compared where they are made. How an operator is called is compared in its first call on
a group, where every rank is at the same moment. A later call compares nothing: only a rank that
calls in a new way would know that there is something to compare, and would wait for the others.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.checks import check_part
from lasp._core.collectives import all_gather
from lasp._core.failure import naming
from lasp._core.graphs import makes_fake_tensors

DIGEST_BYTES, MESSAGE_BYTES = 8, 128

# Operators whose first call on a group was compared; an entry goes with its group.
_COMPARED: WeakKeyDictionary[dist.ProcessGroup, set[str]] = WeakKeyDictionary()


def is_compared(operator: str, group: dist.ProcessGroup) -> bool:
    """Whether the first call of an operator on a group lies behind it."""
    return operator in _COMPARED.get(group, ())


def compare_first_call(
    operator: str, group: dist.ProcessGroup, x: Tensor, how: dict[str, object]
) -> None:
    """:func:`check_same_calls`, remembered for :func:`is_compared`."""
    if check_same_calls(operator, group, x, how):
        _COMPARED.setdefault(group, set()).add(operator)


def check_same_calls(
    operator: str, group: dist.ProcessGroup | None, x: Tensor, how: dict[str, object]
) -> bool:
    """Raise ValueError on every rank of ``group`` unless all call an operator alike.

    Args:
        operator: as users know it, named in the error.
        group: who must agree; every rank must call this. None: one rank.
        x: a tensor of the call, for its device.
        how: what must be equal on every rank, by the name that the error gives it.

    Returns:
        Whether the ranks have compared. Under FakeTensorMode nothing is sent.

    Communication: one gather of objects, some hundred bytes a rank, and a wait for it.

    Raises:
        ExchangeError: if a rank is gone.
        RuntimeError: while a CUDA graph is captured, which can compare nothing.
    """
    if group is None or group.size() == 1:
        return True
    if makes_fake_tensors():
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{operator} must be called once on a group before a CUDA graph is captured, got its"
            " first call during capture: ranks compare there how they call it"
        )
    calls: list[dict[str, str]] = [{}] * group.size()
    told = {"operator": operator} | {name: str(value) for name, value in how.items()}
    # NCCL takes objects through the current device.
    with naming(f"the comparison of first calls of {operator}", group), torch.cuda.device_of(x):
        dist.all_gather_object(calls, told, group)
    differing, others = [], any(call["operator"] != operator for call in calls)
    for name in ["operator"] if others else told:
        ranks_with: dict[str, list[int]] = {}
        for rank, call in enumerate(calls):
            ranks_with.setdefault(call[name], []).append(rank)
        if len(ranks_with) > 1:
            answers = (f"{value} on ranks {ranks}" for value, ranks in ranks_with.items())
            differing.append(f"{name} {', '.join(answers)}")
    if differing:
        raise ValueError(
            f"{calls[0]['operator']} must be called alike on every rank of its group, got"
            f" {'; '.join(differing)}: give all ranks the same options, inputs of one dtype, and"
            " autocast on all or none"
        )
    return True


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
    check_part("group", group, dist.ProcessGroup)
    digest = digest_of(array("q", numbers))
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


def digest_of(numbers: array[int] | array[float]) -> bytes:
    """Eight bytes that tell these numbers from others."""
    return hashlib.blake2b(numbers.tobytes(), digest_size=DIGEST_BYTES).digest()


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group takes messages: the host if it can."""
    backends = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    if "cpu:" in backends:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
