"""Calls whose rows go by plans, and the order of the rows where they arrive.

Rows of a group arrive source by source; experts take them expert by expert. A chunk is what one
source sends to one expert. Few chunks are joined as they are. From ``MANY_CHUNKS`` on one gather
brings all rows into order and one back, by indices that the device makes out of the counts, so that
the host does nothing for each expert.

Example, two sources, two experts, sizes ((2, 1), (1, 1))::

    arrives      source 0: e0 e0 e1   source 1: e0 e1
    index        0 1 3, 2 4           e0 e0 e0  e1 e1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.host_constants import to_device
from lasp._core.impl import ChosenImpl
from moe_parallel.dispatch.dispatcher import Dispatch
from moe_parallel.dispatch.plan import ExchangePlan, RowCounts
from moe_parallel.mesh import ExpertMesh

MANY_CHUNKS = 17  # of a group; those of coarse experts are fewer


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


class ChunkOrder(NamedTuple):
    """Where the rows of chunks are; both orders are None where only ``ends`` was asked for.

    Attributes:
        by_expert: ``[A]`` int64, for each row in the order of the experts its number by arrival.
        by_arrival: ``[A]`` int64, the inverse.
        ends: int32, where the rows of each expert end.
    """

    by_expert: Tensor | None
    by_arrival: Tensor | None
    ends: Tensor


class ChunkCounts(NamedTuple):
    """Sizes of chunks, on the device.

    Attributes:
        impl: how the device makes the order of rows out of them.
        kept: ``[R, E]`` int64, rows of each rank for each expert; None: the device has no counts.
        sources: ranks whose rows arrive here.
        first: number of this rank's first expert.
    """

    impl: ChosenImpl = "eager"
    kept: Tensor | None = None
    sources: tuple[int, ...] = ()
    first: int = 0

    @classmethod
    def of(cls, kept_RE: Tensor | None, mesh: ExpertMesh, impl: ChosenImpl) -> ChunkCounts:
        """Sizes of the chunks that this rank takes, of what all ranks keep; None: not there."""
        if kept_RE is None:
            return cls(impl)
        num_local = kept_RE.shape[1] // mesh.ep_size
        return cls(impl, kept_RE, mesh.sources, mesh.ep_rank * num_local)

    def order(self, experts: range, num_rows: int | None) -> ChunkOrder:
        """The order of the rows that some experts take.

        Args:
            experts: of this rank's experts.
            num_rows: of these experts; None: only ``ends`` is asked for.
        """
        assert self.kept is not None
        sources = device_numbers(self.sources, self.kept.device)
        if self.impl == "triton":
            from moe_parallel.kernels import router

            where = (self.first + experts.start, len(experts))
            return ChunkOrder(*router.chunks(self.kept, sources, *where, num_rows))
        sizes_SE = self.kept.index_select(0, sources).narrow(
            1, self.first + experts.start, len(experts)
        )
        ends = sizes_SE.sum(0).cumsum(0, dtype=torch.int32)
        if num_rows is None:
            return ChunkOrder(None, None, ends)
        by_expert = expert_major(sizes_SE, num_rows)
        numbers = torch.arange(num_rows, device=by_expert.device)
        return ChunkOrder(
            by_expert, torch.empty_like(by_expert).index_copy_(0, by_expert, numbers), ends
        )


class PlannedDispatch(Dispatch):
    """A call whose rows go by plans, made as they are needed.

    Args:
        experts: for each group of the pipeline, which of this rank's experts.
        plans: of each group.
        counts: of the chunks.
    """

    def __init__(
        self,
        experts: tuple[range, ...],
        plans: Sequence[ExchangePlan],
        counts: ChunkCounts = ChunkCounts(),  # noqa: B008 (immutable)
    ) -> None:
        self.experts, self._plans, self._counts = experts, plans, counts
        self._ends: dict[int, Tensor] = {}  # by group, as the next
        self._orders: dict[int, ChunkOrder] = {}

    def expert_rows(self, g: int) -> tuple[int, ...]:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        return self._plans[g].expert_rows

    def expert_ends(self, g: int) -> Tensor | None:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        if self._counts.kept is not None and g not in self._ends:
            self._ends[g] = self._counts.order(self.experts[g], None).ends
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
        order = self._order(g, rows_AM).by_expert
        assert order is not None
        return rows_AM.index_select(0, order)

    def by_arrival(self, g: int, rows_AM: Tensor) -> Tensor:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`; a copy."""
        if not self._has_many_chunks(g):
            return self._plans[g].group_by_source(rows_AM)
        # By a gather too: torch's scatter of rows took three times as long on an H200.
        order = self._order(g, rows_AM).by_arrival
        assert order is not None
        return rows_AM.index_select(0, order)

    def _has_many_chunks(self, g: int) -> bool:
        sources, experts = len(self._plans[g].chunk_rows), len(self.experts[g])
        return experts > 1 and sources * experts >= MANY_CHUNKS

    def _order(self, g: int, rows_AM: Tensor) -> ChunkOrder:
        """The order of the rows of a group; the backward takes that of the forward."""
        if g not in self._orders:
            counts, experts = self._counts, self.experts[g]
            if counts.kept is None:
                rows = self._plans[g].chunk_rows
                sizes_SE = _chunk_sizes(rows, rows_AM.device)
                counts = ChunkCounts(counts.impl, sizes_SE, tuple(range(len(rows))))
                experts = range(len(experts))
            self._orders[g] = counts.order(experts, len(rows_AM))
            self._ends[g] = self._orders[g].ends
        return self._orders[g]


@tensor_cache(maxsize=64)
def device_numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers as an int64 tensor of the device, remembered: a copy would wait for it."""
    with torch.inference_mode(False):  # remembered, and used in training too
        return to_device(torch.tensor(numbers, device="cpu"), device)


def _chunk_sizes(chunk_rows: RowCounts, device: torch.device) -> Tensor:
    """The sizes of chunks, from the host; remembered, for padded calls repeat them."""
    flat = device_numbers(tuple(rows for source in chunk_rows for rows in source), device)
    return flat.view(len(chunk_rows), -1)
