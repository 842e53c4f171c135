"""Into which groups the experts of a rank are cut, and in which order rows leave for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lasp._core.host_constants import to_device
from moe_parallel.mesh import ExpertMesh

# What a group should send at least by NCCL, on average: with two thread blocks 8 groups of 96 MiB
# were faster than 16 of 48; without a limit they were the same.
LEAST_BYTES = 96 * 2**20
# By copies the first rows there and the last ones back are seen, 1 / groups of them all, and each
# group costs launches: their sum is least at a number of groups that grows with the root of the
# bytes. Measured (6144 x 9216, 16 experts a rank): 8 groups of 201 MB and 16 of 805 MB.
COPIED_BYTES = 3 * 2**20
# With ETP by NCCL more than these were slower at every size measured: each is two collectives more,
# of etp_size times the rows, whose thread blocks are not with the products.
MOST_WITH_ETP = 2


def expert_groups(num_local: int, num_groups: int) -> tuple[range, ...]:
    """The rank's experts in groups, in order; the first and the last are half as large as others.

    Nothing is computed while the first rows travel there, nor while the last travel back.
    """
    inner = (num_local * (group - 0.5) / (num_groups - 1) for group in range(1, num_groups))
    return tuple(range(*cut) for cut in pairwise([0, *map(round, inner), num_local]))


def groups_that_pay(num_local: int, rank_bytes: int, mesh: ExpertMesh, *, copied: bool) -> int:
    """Into how many groups to cut the experts of a rank, the same number on every rank.

    By NCCL as many as there are experts, with ETP ``MOST_WITH_ETP``, but so few that the average
    rank sends ``LEAST_BYTES`` a group, its own rows included; by copies the root of these bytes
    over ``COPIED_BYTES``; one where nothing travels.

    Args:
        num_local: experts of a rank.
        rank_bytes: of the rows that the average rank sends.
        mesh: the EP x ETP block of this rank.
        copied: rows travel through :class:`moe_parallel.PeerMemory`.
    """
    if mesh.ep_size * mesh.etp_size == 1:
        return 1
    if copied:
        return min(num_local, max(1, math.isqrt(rank_bytes // COPIED_BYTES)))
    most = num_local if mesh.etp_size == 1 else min(num_local, MOST_WITH_ETP)
    return min(most, max(1, rank_bytes // LEAST_BYTES))


def dispatch_places(num_experts: int, ep_size: int, experts: Sequence[range]) -> list[int]:
    """Of each expert of all ranks, its place in the order of ``Pipeline.run``."""
    num_local = num_experts // ep_size
    order = [
        ep * num_local + local for group in experts for ep in range(ep_size) for local in group
    ]
    places = [0] * num_experts
    for place, expert in enumerate(order):
        places[expert] = place
    return places


class DispatchOrder:
    """Experts by the place at which their rows leave; the places are kept on the device.

    Args:
        num_experts: E, of all EP ranks.
        ep_size: EP ranks.
    """

    def __init__(self, num_experts: int, ep_size: int) -> None:
        self._num_experts, self._ep_size = num_experts, ep_size
        self._places: dict[tuple[int, torch.device], Tensor] = {}

    def places(self, groups: Sequence[range], device: torch.device) -> Tensor | None:
        """``[E]`` int64: of each expert its place; None where it is its number, of one group."""
        if len(groups) == 1:
            return None
        key = (len(groups), device)
        if key not in self._places:
            places = dispatch_places(self._num_experts, self._ep_size, groups)
            with torch.inference_mode(False):  # remembered, and used in training too
                self._places[key] = to_device(torch.tensor(places, device="cpu"), device)
        return self._places[key]
