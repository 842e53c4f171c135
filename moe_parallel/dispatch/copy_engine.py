"""The copy-engine dispatcher: rows between the GPUs of one host, without a multiprocessor.

A rank fetches the rows that its experts take from the memory of the ranks that have them, and
copies its partial sums of the results to the ranks of their tokens::

    dispatch    wait until all ranks have rows;  copy them from where they are
    combine     copy partial sums to their ranks;  wait until all have;  add mine up

Rows arrive expert by expert, from all ranks of the EP x ETP block at once. One copy for each expert
and rank replaces an all-to-all, a gather over ETP and a reordering of all rows; where that would be
many copies, one for each rank, and the reordering stays (:mod:`moe_parallel.dispatch.planned`).
Offsets follow from the counts, which every rank has on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.impl import ChosenImpl
from moe_parallel.dispatch.all_to_all import add_partial_sums
from moe_parallel.dispatch.dispatcher import Dispatch, Lane, RowTransfer
from moe_parallel.dispatch.plan import ExchangePlan, GroupPlans, RowCounts
from moe_parallel.dispatch.planned import ChunkCounts, PlannedDispatch
from moe_parallel.dispatch.symmetric_memory import (
    EVEN,
    ODD,
    OPEN,
    OutgoingRows,
    SymmetricMemory,
    queued_copies,
)
from moe_parallel.mesh import ExpertMesh

# The first rows there and the last ones back stay visible, 1 / groups of them all, and each group
# costs launches: their sum is least at a number of groups that grows with the root of the bytes.
# Measured (6144 x 9216, 16 experts a rank): 8 groups of 201 MB and 16 of 805 MB.
COPIED_BYTES = 3 * 2**20


class CopyEngineDispatcher:
    """Rows by copies through symmetric memory.

    Args:
        mesh: the EP x ETP block of this rank.
        process_groups: of the block, whose backwards wait for each other.
        memory: of the block, etp fastest.
    """

    def __init__(
        self,
        mesh: ExpertMesh,
        process_groups: tuple[dist.ProcessGroup, ...],
        memory: SymmetricMemory,
    ) -> None:
        self._mesh, self._process_groups, self._memory = mesh, process_groups, memory

    def __deepcopy__(self, memo: object) -> CopyEngineDispatcher:
        """Itself: copies of a model, as for moving averages, work over the same ranks."""
        return self

    def overlap_groups(self, num_local: int, rank_bytes: int) -> int:
        """The root of the bytes over ``COPIED_BYTES``."""
        return min(num_local, max(1, math.isqrt(rank_bytes // COPIED_BYTES)))

    def start_call(
        self,
        kept_RE: Callable[[], RowCounts],
        experts: tuple[range, ...],
        *,
        most_rows: int,
        like: Tensor,
        kept: Tensor | None = None,
        impl: ChosenImpl = "eager",
    ) -> Dispatch:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatcher`; the memory may grow."""
        needed = (most_rows * like.element_size() * like.shape[1], self._mesh.etp_size)
        if not self._memory.fits(*needed):
            kept_RE()  # raises on ranks that believe in other numbers: they do not grow
        self._memory.reserve(*needed)
        plans = GroupPlans(kept_RE, self._mesh, experts)
        outgoing, counts = OutgoingRows(self._memory), ChunkCounts.of(kept, self._mesh, impl)
        return CopyEngineDispatch(experts, plans, self._process_groups, outgoing, counts)


class _Chunk(NamedTuple):
    """Rows of one rank that are copied together, in bytes."""

    rank: int  # in the group of the memory
    there: int  # offset among the rows that the rank sends
    here: int  # offset among those that arrive
    size: int


class CopyEngineDispatch(PlannedDispatch):
    """One call of :class:`CopyEngineDispatcher`: its runs, one at a time.

    Communication: for each group and run copies out of the memory of the other ranks, the bytes of
    their rows, and copies into it, the bytes of their results.
    """

    lanes: tuple[Lane, ...] = ("ep",)

    def __init__(
        self,
        experts: tuple[range, ...],
        plans: Sequence[ExchangePlan],
        process_groups: tuple[dist.ProcessGroup, ...],
        outgoing: OutgoingRows,
        counts: ChunkCounts,
    ) -> None:
        super().__init__(experts, plans, counts)
        self.process_groups, self.place = process_groups, outgoing.place
        self._outgoing, self._memory = outgoing, outgoing.memory

    def open(self, rows_AM: Tensor) -> None:
        """Publish rows and wait until all ranks have; the run before is over.

        Args:
            rows_AM: ``[A, M]``, contiguous, what this rank sends, group by group, in each by EP
                rank. Rows that do not lie in :attr:`place` are copied there.
        """
        self._plans[0]
        memory = self._memory
        self._row_bytes = rows_AM.element_size() * rows_AM.shape[1]
        self._chunks: dict[int, list[_Chunk]] = {}  # by group
        self._phases = cycle((EVEN, ODD))
        if rows_AM.is_cuda and torch.cuda.is_current_stream_capturing():
            memory.captured = True
        if not self._outgoing.hold(rows_AM):
            self._outgoing.place(len(rows_AM), rows_AM).copy_(rows_AM)
        self._like = rows_AM  # until close, which is not called if this method raises
        memory.pulls.wait_stream(memory.module.current_stream())
        memory.signal(OPEN, memory.pulls)
        memory.wait(OPEN, memory.pulls)

    def close(self) -> None:
        """The current stream waits for all copies."""
        current = self._memory.module.current_stream()
        for stream in (self._memory.pulls, self._memory.pushes):
            current.wait_stream(stream)
        del self._like  # a call outlives its run

    def dispatch(self, g: int, rows_AM: Tensor, stream: torch.cuda.Stream | None) -> RowTransfer:
        """Start to fetch the rows of a group; they arrive by expert, within it by source.

        Rows of many chunks arrive by source, see :meth:`by_expert`.

        Args:
            g: number of the group.
            rows_AM: held until they have arrived.
            stream: the current stream, if it is at hand: asking for it takes time.
        """
        memory, pulls, plan = self._memory, self._memory.pulls, self._plans[g]
        arriving = self._like.new_empty(sum(map(sum, plan.chunk_rows)), self._like.shape[1])
        here, self._chunks[g] = arriving.data_ptr(), self._chunks_of(g, plan)
        pulls.wait_stream(stream or memory.module.current_stream())
        for rank, there, start, size in self._chunks[g]:
            memory.streams.copy(here + start, memory.rows_at[rank] + there, size, pulls)
        return RowTransfer(arriving, rows_AM, queued_copies(memory.module, pulls))

    def combine(
        self, g: int, rows_AM: Tensor, into: Tensor, stream: torch.cuda.Stream | None
    ) -> RowTransfer:
        """Start to send partial sums to the ranks of their tokens, and to add up what arrives here.

        Args:
            g: number of a group that was dispatched.
            rows_AM: partial sums for the rows that :meth:`dispatch` brought, in their order.
            into: for the results of the rows that this rank sent, in theirs.
            stream: see :meth:`dispatch`.
        """
        rows_AM, plan = rows_AM.contiguous(), self._plans[g]
        memory, pushes, me = self._memory, self._memory.pushes, self._memory.rank
        here, num_partial, chunks = rows_AM.data_ptr(), len(plan.etp_rows), self._chunks.pop(g)
        part = me % num_partial * memory.num_bytes
        pushes.wait_stream(stream or memory.module.current_stream())
        for rank, there, start, size in chunks:
            if rank != me:
                to = memory.results_at[rank] + part + there
                memory.streams.copy(to, here + start, size, pushes)
        phase = next(self._phases)
        memory.signal(phase, pushes)
        # A single partial sum is the result: mine need not go through the shared memory.
        mine = into.data_ptr() - plan.first * self._row_bytes
        mine = mine if num_partial == 1 else memory.results_at[me] + part
        for rank, there, start, size in chunks:
            if rank == me:
                memory.streams.copy(mine + there, here + start, size, pushes)
        memory.wait(phase, pushes)
        self._take(into, plan, pushes)
        return RowTransfer(into, rows_AM, queued_copies(memory.module, pushes))

    def _take(self, into: Tensor, plan: ExchangePlan, stream: Any) -> None:
        """Copy or add up what arrived, out of the shared memory."""
        memory, num_partial = self._memory, len(plan.etp_rows)
        if num_partial > 1:
            with memory.module.stream(stream):
                results = memory.results(len(self._like), self._like)
                add_partial_sums(results[:num_partial].narrow(1, plan.first, len(into)), into)
            return
        source = memory.results_at[memory.rank] + plan.first * self._row_bytes
        target, start = into.data_ptr(), 0
        for rank, count in enumerate(plan.dispatch_rows):
            size = count * self._row_bytes
            if rank != memory.rank and size:
                memory.streams.copy(target + start, source + start, size, stream)
            start += size

    def by_expert(self, g: int, rows_AM: Tensor) -> Tensor:
        """Rows that were copied for each expert have arrived so."""
        return super().by_expert(g, rows_AM) if self._has_many_chunks(g) else rows_AM

    def by_arrival(self, g: int, rows_AM: Tensor) -> Tensor:
        """Inverse of :meth:`by_expert`."""
        return super().by_arrival(g, rows_AM) if self._has_many_chunks(g) else rows_AM

    def _chunks_of(self, g: int, plan: ExchangePlan) -> list[_Chunk]:
        """The rows of this rank's experts, from the next rank on: not all turn to the same one.

        Rows of many experts, which a rank sends one after the other, are one chunk of it.
        """
        here, found = 0, []
        there = [start * self._row_bytes for start in plan.starts]
        together = [tuple(map(sum, plan.chunk_rows))]
        for rows in together if self._has_many_chunks(g) else zip(*plan.chunk_rows):
            for source, num_rows in enumerate(rows):
                size = num_rows * self._row_bytes
                if size:
                    found.append(_Chunk(plan.sources[source], there[source], here, size))
                there[source] += size
                here += size
        me, ranks = self._memory.rank, len(self._memory.ranks)
        return sorted(found, key=lambda chunk: (chunk.rank - me - 1) % ranks)
