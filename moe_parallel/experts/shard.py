"""A rank's part of parameters that EP x ETP ranks hold together, guarded against mix-ups.

Parts are plain tensors of the same names and shapes on every rank: to a tool that does not know of
expert parallelism they look like replicas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from lasp._core.checks import check_sizes


class ShardedDims(NamedTuple):
    """The dimensions of a parameter that are split over EP and over ETP."""

    ep_dim: int
    etp_dim: int


class ExpertShard(nn.Module):
    """A module whose parameters are this rank's part, with its position in the EP x ETP block.

    Until they are DTensors over the axes that they are split over
    (:func:`moe_parallel.distribute_experts`), ``state_dict()``, ``load_state_dict()`` and sharding
    them raise ValueError.

    Args:
        ep_rank: this rank in the EP group.
        ep_size: EP ranks.
        etp_rank: this rank in the ETP group.
        etp_size: ETP ranks.

    Attributes:
        saved_by_part: set by trainers that give each part a name of its own, as Megatron's
            checkpoints do; ``state_dict()`` is then this rank's.
    """

    def __init__(self, ep_rank: int, ep_size: int, etp_rank: int, etp_size: int) -> None:
        super().__init__()
        self.ep_rank, self.ep_size = ep_rank, ep_size
        self.etp_rank, self.etp_size = etp_rank, etp_size
        self.saved_by_part = False

    @property
    def split_axes(self) -> tuple[str, ...]:
        """The axes, of ``ep`` and ``etp``, over which the parameters are cut."""
        sizes = {"ep": self.ep_size, "etp": self.etp_size}
        return tuple(axis for axis, size in sizes.items() if size > 1)

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any module; ValueError for what would cut parts across each other."""
        mesh = getattr(value, "device_mesh", None)
        if mesh is not None and not set(self.split_axes) <= set(mesh.mesh_dim_names or ()):
            raise ValueError(
                f"{name} must not be sharded over {mesh} while it is split over {self.split_axes}:"
                " ranks hold other experts. Use moe_parallel.apply_fsdp, or distribute_experts"
                " before fully_shard"
            )
        super().__setattr__(name, value)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._check_whole("state_dict()")
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._check_whole("load_state_dict()")
        super()._load_from_state_dict(*args)

    def _check_whole(self, what: str) -> None:
        """Raise ValueError for parameters that nobody could tell from another rank's."""
        plain = not all(hasattr(weight, "device_mesh") for weight in self.parameters())
        if self.split_axes and plain and not self.saved_by_part:
            raise ValueError(
                f"{what} needs whole experts or DTensors, got plain parts, split over"
                f" {self.split_axes}, that have the same names on every rank: call"
                " moe_parallel.distribute_experts(model, topology) first"
            )


def generator_of(seed: int) -> torch.Generator:
    """A CPU generator at the start of a seed's sequence."""
    check_sizes(-(2**63), seed=seed)
    return torch.Generator("cpu").manual_seed(seed)
