"""Rows to the ranks of their experts and back."""

from __future__ import annotations

from lasp._core.checks import check_part
from moe_parallel.dispatch.all_to_all import AllToAllDispatcher
from moe_parallel.dispatch.copy_engine import CopyEngineDispatcher
from moe_parallel.dispatch.dispatcher import Dispatcher, LocalDispatcher
from moe_parallel.dispatch.symmetric_memory import SymmetricMemory
from moe_parallel.mesh import ExpertMesh, block_ranks
from moe_parallel.topology import ExpertGroups

__all__ = ["SymmetricMemory", "make_dispatcher"]


def make_dispatcher(
    mesh: ExpertMesh, groups: ExpertGroups, memory: SymmetricMemory | None
) -> Dispatcher:
    """The transport of a layer: the only place that chooses one.

    Args:
        mesh: the EP x ETP block of this rank.
        groups: its process groups.
        memory: shared by the block; None sends rows by all-to-all. One rank uses neither.

    Raises:
        ValueError: if the memory is none, or that of other ranks.
    """
    check_part("symmetric_memory", memory, SymmetricMemory, optional=True)
    if memory is not None and memory.global_ranks != (block := block_ranks(groups)):
        raise ValueError(
            f"symmetric_memory must be the memory of the EP x ETP block {block}, got that of ranks"
            f" {memory.global_ranks}: make it with SymmetricMemory(group) of the block,"
            " groups.ep_etp, or groups.ep or groups.etp if the other is one rank"
        )
    if len(mesh.sources) == 1:
        return LocalDispatcher(mesh.token_rank)
    if memory is None:
        return AllToAllDispatcher(mesh, groups.ep, groups.etp)
    process_groups = tuple(group for group in (groups.ep, groups.etp) if group is not None)
    return CopyEngineDispatcher(mesh, process_groups, memory)
