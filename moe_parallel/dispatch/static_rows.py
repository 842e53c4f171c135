"""Dropless calls of static shapes: memory for so many rows, whatever the routing.

Over EP every token goes to every rank, and the rows of a rank's experts lie in memory for
``max_rows``, expert by expert, within an expert by source. Products take offsets that the device
counts; rows of the memory beyond the last one hold nothing, and nobody reads them. Where
more rows would come, those that do not fit are dropped, as by a capacity: they add nothing to the
output and get no gradient. Nobody can raise while a CUDA graph runs, so every rank counts them:
``RoutingStats.dropped`` has each call's, :func:`moe_parallel.check_max_rows` raises for those of
all calls since it was last asked.

Example, one expert on each of two ranks, 3 tokens a rank, k = 1, ``max_rows`` 4::

    assigned, of rank 0    3 0        kept    3 0        rows of expert 0    0 1 2   of rank 0
              of rank 1    2 1                1 1                            3       of rank 1
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.impl import ChosenImpl
from moe_parallel.config import MoEConfig
from moe_parallel.mesh import ExpertMesh
from moe_parallel.router.token_order import TokenOrder


def check_static_mesh(mesh: ExpertMesh) -> None:
    """Raise ValueError for a mesh over which calls have no static shapes."""
    if mesh.etp_size > 1:
        raise ValueError(
            f"static_shapes must be False with ETP, got {mesh.etp_size} ranks of it: every rank"
            " would take the tokens of all; use EP alone"
        )
    first = mesh.token_rank - mesh.ep_rank
    if first % mesh.ep_size or mesh.sources != tuple(range(first, first + mesh.ep_size)):
        raise ValueError(
            "with static_shapes groups.ep must be consecutive ranks of groups.token, the first a"
            f" multiple of its size, got ranks {list(mesh.sources)}: every rank counts what others"
            " drop; make them with ExpertTopology.build_groups"
        )


def memory_rows(config: MoEConfig, mesh: ExpertMesh, order: TokenOrder) -> tuple[int, bool]:
    """Rows of memory of a rank's experts, and whether more may come.

    Raises:
        ValueError: on every rank, if more than ``max_rows`` come however they are routed.
    """
    ep, top_k = mesh.ep_size, config.top_k
    tokens = [order.num_local_tokens(rank) for rank in range(order.num_ranks)]
    of_block = max(sum(tokens[first : first + ep]) for first in range(0, len(tokens), ep))
    all_rows = of_block * min(top_k, config.num_experts // ep)
    if config.max_rows is None or config.max_rows >= all_rows:
        return all_rows, False
    if (least := -(-of_block * top_k // ep)) > config.max_rows:
        raise ValueError(
            f"max_rows must be at least {least}, {top_k} for each of {of_block} tokens over {ep}"
            f" EP ranks, got {config.max_rows}: allow more, or route fewer tokens a call"
        )
    return config.max_rows, True


class FittingRows(NamedTuple):
    """What fits into the memory of the experts' ranks; the same on every rank, on the device.

    Attributes:
        kept: ``[R, E]`` int64, assignments of each rank that fit.
        wanted: ``[R]`` int64, rows that the experts of each rank would take.
    """

    kept: Tensor
    wanted: Tensor


def fitting_rows(
    assigned_RE: Tensor, ep_size: int, memory: int, impl: ChosenImpl = "eager"
) -> FittingRows:
    """Count the rows that fit where every rank's experts have memory for so many.

    Args:
        assigned_RE: int64, assignments of each rank; blocks of ``ep_size`` ranks have all experts.
        ep_size: EP ranks.
        memory: in rows.
        impl: ``triton``: one kernel.
    """
    if impl == "triton":
        from moe_parallel.kernels import router

        return FittingRows(*router.fitting(assigned_RE, ep_size, memory))
    num_ranks, num_experts = assigned_RE.shape
    # [blocks, sources, EP ranks, experts of a rank] to the order of the rows of each EP rank.
    by_source = assigned_RE.view(-1, ep_size, ep_size, num_experts // ep_size)
    by_expert = by_source.permute(0, 2, 3, 1)
    ends = by_expert.flatten(2).cumsum(2)
    none = ends.new_zeros(*ends.shape[:2], 1)
    kept = ends.clamp(max=memory).diff(dim=2, prepend=none)
    kept = kept.view(by_expert.shape).permute(0, 3, 1, 2).reshape(num_ranks, num_experts)
    return FittingRows(kept, ends[..., -1].flatten())


class MostRows:
    """The most rows that each rank would have taken in the calls of a layer, on the device.

    Only calls that may drop some note them; a call that is recomputed does no harm.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def note(self, wanted_R: Tensor | None) -> None:
        """Add a call; in place, so that a CUDA graph does it too."""
        if wanted_R is None:
            return
        if self.value is None or self.value.device != wanted_R.device:
            with torch.inference_mode(False):  # kept, and used in training too
                self.value = torch.zeros_like(wanted_R)
        torch.maximum(self.value, wanted_R, out=self.value)
