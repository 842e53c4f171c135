"""Calls whose rows go by plans, and the order of the rows where they arrive.

Rows of a group arrive source by source; experts take them expert by expert. A chunk is what one
source sends to one expert. Few chunks are joined as they are. From ``MANY_CHUNKS`` on one gather
brings all rows into order, by an index that the device makes out of the counts, so that the host
does nothing for each expert.

Example, two sources, two experts, sizes ((2, 1), (1, 1))::

    arrives      source 0: e0 e0 e1   source 1: e0 e1
    index        0 1 3, 2 4           e0 e0 e0  e1 e1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.host_constants import to_device
from moe_parallel.dispatch.dispatcher import Dispatch
from moe_parallel.dispatch.plan import ExchangePlan, RowCounts
from moe_parallel.mesh import ExpertMesh

MANY_CHUNKS = 17  # of a group; those of coarse experts are fewer


def kept_of_sources(kept_RE: Tensor | None, mesh: ExpertMesh) -> Tensor | None:
    """``[S, E_local]``: of the counts of all ranks those of rows that this rank's experts take."""
    if kept_RE is None:
        return None
    num_local = kept_RE.shape[1] // mesh.ep_size
    of_sources = kept_RE.index_select(0, device_numbers(mesh.sources, kept_RE.device))
    return of_sources.narrow(1, mesh.ep_rank * num_local, num_local)


def expert_major(sizes_SE: Tensor, num_rows: int) -> Tensor:
    """``[A]`` int64: for each row in the order of the experts its number in that of arrival.

    Args:
        sizes_SE: of the chunks.
        num_rows: A, their sum; known on the host, so that nothing here waits for the device.
    """
    sizes = sizes_SE.flatten()
    starts_SE = (sizes.cumsum(0) - sizes).view_as(sizes_SE)
    sizes, starts = sizes_SE.T.flatten(), starts_SE.T.flatten()
    shifts = starts - (sizes.cumsum(0) - sizes)
    rows_A = torch.arange(num_rows, device=sizes.device)
    return rows_A + shifts.repeat_interleave(sizes, output_size=num_rows)


class PlannedDispatch(Dispatch):
    """A call whose rows go by plans, made as they are needed.

    Args:
        experts: for each group of the pipeline, which of this rank's experts.
        plans: of each group.
        kept_SE: :func:`kept_of_sources`; None: the device does not have them.
    """

    def __init__(
        self,
        experts: tuple[range, ...],
        plans: Sequence[ExchangePlan],
        kept_SE: Tensor | None = None,
    ) -> None:
        self.experts, self._plans, self._kept_SE = experts, plans, kept_SE
        self._ends: dict[int, Tensor] = {}  # by group, as the next
        self._orders: dict[int, Tensor] = {}

    def expert_rows(self, g: int) -> tuple[int, ...]:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        return self._plans[g].expert_rows

    def expert_ends(self, g: int) -> Tensor | None:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        if self._kept_SE is not None and g not in self._ends:
            self._ends[g] = self._sizes(g, self._kept_SE).sum(0).cumsum(0, dtype=torch.int32)
        return self._ends.get(g)

    def own_rows(self, g: int, rows_AM: Tensor) -> Tensor:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        plan = self._plans[g]
        return rows_AM.narrow(0, plan.first, sum(plan.dispatch_rows))

    def open(self, rows_AM: Tensor) -> None:
        """Wait for the counts."""
        self._plans[0]

    def by_expert(self, g: int, rows_AM: Tensor) -> Tensor:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`; a copy."""
        if not self._has_many_chunks(g):
            return self._plans[g].group_by_expert(rows_AM)
        return rows_AM.index_select(0, self._order(g, rows_AM))

    def by_arrival(self, g: int, rows_AM: Tensor) -> Tensor:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`; a copy."""
        if not self._has_many_chunks(g):
            return self._plans[g].group_by_source(rows_AM)
        return torch.empty_like(rows_AM).index_copy_(0, self._order(g, rows_AM), rows_AM)

    def _has_many_chunks(self, g: int) -> bool:
        sources, experts = len(self._plans[g].chunk_rows), len(self.experts[g])
        return experts > 1 and sources * experts >= MANY_CHUNKS

    def _order(self, g: int, rows_AM: Tensor) -> Tensor:
        """:func:`expert_major` of a group; the backward takes that of the forward."""
        if g not in self._orders:
            if self._kept_SE is None:
                sizes_SE = _chunk_sizes(self._plans[g].chunk_rows, rows_AM.device)
            else:
                sizes_SE = self._sizes(g, self._kept_SE)
            self._orders[g] = expert_major(sizes_SE, len(rows_AM))
        return self._orders[g]

    def _sizes(self, g: int, kept_SE: Tensor) -> Tensor:
        return kept_SE[:, self.experts[g].start : self.experts[g].stop]


@tensor_cache(maxsize=64)
def device_numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers as an int64 tensor of the device, remembered: a copy would wait for it."""
    with torch.inference_mode(False):  # remembered, and used in training too
        return to_device(torch.tensor(numbers, device="cpu"), device)


def _chunk_sizes(chunk_rows: RowCounts, device: torch.device) -> Tensor:
    """The sizes of chunks, from the host; remembered, for padded calls repeat them."""
    flat = device_numbers(tuple(rows for source in chunk_rows for rows in source), device)
    return flat.view(len(chunk_rows), -1)
