"""This rank's position among the ranks that share its experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist

from lasp._core.checks import check_part
from moe_parallel.topology import ExpertGroups


@dataclass(frozen=True)
class ExpertMesh:
    """The EP x ETP block of this rank, in ranks of the token group; host data.

    Attributes:
        token_rank: this rank in the token group.
        num_token_ranks: size of the token group.
        ep_rank: this rank in the EP group.
        etp_rank: this rank in the ETP group.
        token_ranks: ``token_ranks[etp][ep]`` is that member's rank in the token group.
    """

    token_rank: int
    num_token_ranks: int
    ep_rank: int
    etp_rank: int
    token_ranks: tuple[tuple[int, ...], ...]

    @cached_property
    def ep_size(self) -> int:
        """Number of EP ranks."""
        return len(self.token_ranks[0])

    @cached_property
    def etp_size(self) -> int:
        """Number of ETP ranks."""
        return len(self.token_ranks)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Ranks of the token group whose rows this one computes, in the order of the plans."""
        return tuple(rank for token_ranks in self.token_ranks for rank in token_ranks)


def _members(group: dist.ProcessGroup | None, me: int) -> list[int]:
    return [me] if group is None else dist.get_process_group_ranks(group)


def block_ranks(groups: ExpertGroups) -> list[int]:
    """Global ranks of the EP x ETP block of groups that :func:`expert_mesh` has checked."""
    block = groups.ep_etp or groups.ep or groups.etp
    return [dist.get_rank()] if block is None else dist.get_process_group_ranks(block)


def expert_mesh(groups: ExpertGroups) -> ExpertMesh:
    """Check that the four groups fit together and number their ranks.

    Raises:
        ValueError: naming the group that does not fit.
    """
    check_part("groups", groups, ExpertGroups)
    if groups == ExpertGroups():
        return ExpertMesh(0, 1, 0, 0, ((0,),))
    me = dist.get_rank()
    block = groups.ep_etp
    if block is None and (groups.ep is None or groups.etp is None):
        block = groups.ep if groups.etp is None else groups.etp
    token, ep, etp, ep_etp = (
        _members(group, me) for group in (groups.token, groups.ep, groups.etp, block)
    )
    for name, ranks in (("token", token), ("ep", ep), ("etp", etp), ("ep_etp", ep_etp)):
        if me not in ranks:
            raise ValueError(f"groups.{name} must hold this rank {me}, got ranks {ranks}")
    if len(ep_etp) != len(ep) * len(etp):
        raise ValueError(
            f"groups.ep_etp must have ep {len(ep)} x etp {len(etp)} ranks, got {len(ep_etp)}:"
            " give the group of all ranks that share these experts"
        )
    ep_rank, etp_rank = divmod(ep_etp.index(me), len(etp))
    if ep_etp[etp_rank :: len(etp)] != ep or ep_etp[ep_rank * len(etp) :][: len(etp)] != etp:
        raise ValueError(
            f"groups.ep_etp must be ordered with etp fastest, got {ep_etp} for ep {ep}, etp {etp}"
        )
    if not set(ep_etp) <= set(token):
        raise ValueError(
            f"groups.token must hold the whole EP x ETP block {ep_etp}, got {token}: it is the"
            " group of all ranks over which the tokens are split"
        )
    token_ranks = tuple(
        tuple(token.index(ep_etp[ep_at * len(etp) + etp_at]) for ep_at in range(len(ep)))
        for etp_at in range(len(etp))
    )
    return ExpertMesh(token.index(me), len(token), ep_rank, etp_rank, token_ranks)
