"""Which ranks form which group: two meshes over the same ranks, as in MiniMax-01.

Dense layers and experts cut the world differently (paper equations 15 and 16)::

    world = PP x DP  x CP  x TP     dense mesh,  tp fastest, then cp, dp, pp
    world = PP x EDP x EP  x ETP    expert mesh, etp fastest, then ep, edp, pp

Both orders are Megatron-Core's. The slowest axis is pp in both, so a pipeline stage is one block of
consecutive ranks, and inside it either mesh names every rank once.

Example: 8 ranks, tp 1, cp 4, dp 2 for dense layers; etp 2, ep 2, edp 2 for experts::

    rank        0 1 2 3 | 4 5 6 7
    dense  dp   0 0 0 0 | 1 1 1 1
           cp   0 1 2 3 | 0 1 2 3
    expert edp  0 0 0 0 | 1 1 1 1
           ep   0 0 1 1 | 0 0 1 1
           etp  0 1 0 1 | 0 1 0 1
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal, NamedTuple, get_args

import torch.distributed as dist

from lasp._core.checks import check_one_of, check_sizes

Axis = Literal["tp", "cp", "dp", "pp", "dp_cp", "token", "ep", "etp", "edp", "ep_etp"]

# Every axis as (mesh, the coordinates that vary inside one of its groups).
_AXES: dict[Axis, tuple[Literal["dense", "expert"], tuple[str, ...]]] = {
    "tp": ("dense", ("tp",)),
    "cp": ("dense", ("cp",)),
    "dp": ("dense", ("dp",)),
    "pp": ("dense", ("pp",)),
    "dp_cp": ("dense", ("cp", "dp")),
    "token": ("dense", ("tp", "cp", "dp")),
    "ep": ("expert", ("ep",)),
    "etp": ("expert", ("etp",)),
    "edp": ("expert", ("edp",)),
    "ep_etp": ("expert", ("etp", "ep")),
}


class DenseCoordinates(NamedTuple):
    """Where a rank stands in the dense mesh, fastest axis first."""

    tp: int
    cp: int
    dp: int
    pp: int


class ExpertCoordinates(NamedTuple):
    """Where a rank stands in the expert mesh, fastest axis first."""

    etp: int
    ep: int
    edp: int
    pp: int


class ExpertGroups(NamedTuple):
    """The process groups an expert layer works with; ``None`` is a group of one rank.

    Attributes:
        token: all ranks over which the tokens of one routing decision are split (a whole pipeline
            stage). Counts for capacity and the auxiliary loss are gathered over it.
        ep: ranks that hold different experts and the same part of each; tokens travel over it.
        etp: ranks that hold different parts of the same experts.
        ep_etp: the EP x ETP block of this rank, etp fastest; may be left out if ep or etp is None.
    """

    token: dist.ProcessGroup | None = None
    ep: dist.ProcessGroup | None = None
    etp: dist.ProcessGroup | None = None
    ep_etp: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: object) -> ExpertGroups:
        """Itself: copies of a model, as for moving averages, work over the same ranks."""
        return self


class ParallelGroups(NamedTuple):
    """This rank's process group along every axis; ``None`` is a group of one rank.

    Axes whose groups hold the same ranks share one communicator.
    """

    tp: dist.ProcessGroup | None
    cp: dist.ProcessGroup | None
    dp: dist.ProcessGroup | None
    pp: dist.ProcessGroup | None
    dp_cp: dist.ProcessGroup | None
    token: dist.ProcessGroup | None
    ep: dist.ProcessGroup | None
    etp: dist.ProcessGroup | None
    edp: dist.ProcessGroup | None
    ep_etp: dist.ProcessGroup | None

    def __deepcopy__(self, memo: object) -> ParallelGroups:
        """Itself, see :class:`ExpertGroups`."""
        return self

    @property
    def experts(self) -> ExpertGroups:
        """The four groups that :class:`moe_parallel.ExpertParallelMoE` takes."""
        return ExpertGroups(self.token, self.ep, self.etp, self.ep_etp)


@dataclass(frozen=True)
class ExpertTopology:
    """Sizes of the two meshes; pure host data, equal on every rank.

    Args:
        world_size: ranks in all.
        pp: pipeline stages.
        tp: tensor parallel size of dense layers. With tp > 1 an expert layer expects the tokens
            split over tp too (sequence parallelism).
        cp: context parallel size of dense layers.
        ep: ranks over which the experts are dealt out.
        etp: ranks over which the FFN dimension of each expert is split.

    Raises:
        ValueError: if a size is no integer >= 1 or the sizes of a mesh do not divide the world.
    """

    world_size: int
    pp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        check_sizes(**asdict(self))
        for names in (("pp", "tp", "cp"), ("pp", "ep", "etp")):
            block = 1
            for name in names:
                block *= getattr(self, name)
            if self.world_size % block:
                sizes = ", ".join(f"{name} {getattr(self, name)}" for name in names)
                raise ValueError(
                    f"{' x '.join(names)} must divide world_size {self.world_size}, got {sizes},"
                    f" product {block}: change one of them or the number of ranks"
                )

    @property
    def dp(self) -> int:
        """Data parallel size of dense layers: world / (pp x cp x tp), equation 15."""
        return self.world_size // (self.pp * self.cp * self.tp)

    @property
    def edp(self) -> int:
        """Replicas of each expert: world / (pp x etp x ep), equation 16."""
        return self.world_size // (self.pp * self.etp * self.ep)

    def dense_coordinates(self, rank: int) -> DenseCoordinates:
        """Coordinates of a global rank in the dense mesh."""
        tp, cp, dp, pp = self._coordinates(rank, (self.tp, self.cp, self.dp))
        return DenseCoordinates(tp=tp, cp=cp, dp=dp, pp=pp)

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Coordinates of a global rank in the expert mesh."""
        etp, ep, edp, pp = self._coordinates(rank, (self.etp, self.ep, self.edp))
        return ExpertCoordinates(etp=etp, ep=ep, edp=edp, pp=pp)

    def _coordinates(self, rank: int, sizes: tuple[int, int, int]) -> tuple[int, int, int, int]:
        if rank not in range(self.world_size):
            raise ValueError(f"rank must be a global rank in [0, {self.world_size}), got {rank!r}")
        rank, first = divmod(rank, sizes[0])
        rank, second = divmod(rank, sizes[1])
        fourth, third = divmod(rank, sizes[2])
        return first, second, third, fourth

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """All groups along an axis: disjoint, covering the world, members in ascending order.

        Args:
            axis: one mesh axis, or a block of them: ``dp_cp``, ``token`` (tp x cp x dp, all ranks
                of a stage) or ``ep_etp``.
        """
        check_one_of(Axis, axis=axis)
        mesh, inside = _AXES[axis]
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            at: DenseCoordinates | ExpertCoordinates
            at = self.dense_coordinates(rank) if mesh == "dense" else self.expert_coordinates(rank)
            outside = tuple(value for name, value in zip(at._fields, at) if name not in inside)
            members.setdefault(outside, []).append(rank)
        return [tuple(ranks) for ranks in members.values()]

    def build_groups(self, timeout: timedelta | None = None) -> ParallelGroups:
        """Make every process group; a collective call of all ranks, in one fixed order.

        A set of ranks gets one communicator, whichever axes name it, and the whole world is
        ``dist.group.WORLD``. Call it once a process: groups are not freed.

        Args:
            timeout: of a collective of the groups that are made, best that of
                ``init_process_group``. None: torch's default, whatever the default group has, 30
                minutes for gloo and 10 for NCCL.

        Raises:
            ValueError: if the default process group has not ``world_size`` ranks.
        """
        if dist.get_world_size() != self.world_size:
            raise ValueError(
                f"world_size must be the size of the default group {dist.get_world_size()},"
                f" got {self.world_size}: build the topology from dist.get_world_size()"
            )
        made: dict[tuple[int, ...], dist.ProcessGroup | None]
        made = {tuple(range(self.world_size)): dist.group.WORLD}
        mine: dict[str, dist.ProcessGroup | None] = {}
        for axis in get_args(Axis):
            for ranks in self.groups(axis):
                if len(ranks) > 1 and ranks not in made:
                    made[ranks] = dist.new_group(list(ranks), timeout=timeout)
                if dist.get_rank() in ranks:
                    mine[axis] = made[ranks] if len(ranks) > 1 else None
        return ParallelGroups(**mine)
