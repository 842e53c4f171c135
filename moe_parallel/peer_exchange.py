"""Rows between the GPUs of one host by their copy engines, without a multiprocessor.

A rank fetches the rows that its experts take out of the memory of the ranks that have them, and
puts its terms of the results where their tokens are, both with plain copies::

    dispatch    wait until all ranks have rows;  copy them from where they are
    combine     copy terms to the ranks of their tokens;  wait until all have;  add mine up

Rows arrive in the order of the experts, from all ranks of the EP x ETP block at once: what takes an
all-to-all, a gather over ETP and a copy of all rows into another order is one copy for each expert
and rank here. Offsets follow from the counts, which every rank has on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_parallel.exchange import ExchangePlan
from moe_parallel.peer_memory import EVEN, ODD, OPEN, Copied, PeerMemory


class _Chunk(NamedTuple):
    """The rows of one rank for one expert.

    Attributes:
        rank: in the group of the memory.
        there: where they begin among the rows that the rank sends.
        here: where among those that arrive.
        num_rows: how many.
    """

    rank: int
    there: int
    here: int
    num_rows: int


class PeerExchange:
    """One call's rows on their way to other ranks and back; the call before is over.

    As a context: however it ends, the current stream then waits for all copies.

    Args:
        memory: of the EP x ETP block, etp fastest.
        rows_AM: ``[A, M]``, contiguous, what this rank sends, group by group, in each by EP rank;
            in :meth:`PeerMemory.place`, or copied there. They fit into what is reserved.
        terms: of a result, the number of ETP ranks.
    """

    def __init__(self, memory: PeerMemory, rows_AM: Tensor, terms: int) -> None:
        self._memory, self._terms, self._like = memory, terms, rows_AM
        self._row_bytes = rows_AM.element_size() * rows_AM.shape[1]
        self._phases = (EVEN, ODD)
        if rows_AM.is_cuda and torch.cuda.is_current_stream_capturing():
            memory.captured = True
        if rows_AM.data_ptr() != memory.rows_at[memory.rank]:
            memory.place(len(rows_AM), rows_AM).copy_(rows_AM)
        self._arrived = memory.results(len(rows_AM), rows_AM)[:terms]
        memory.pulls.wait_stream(memory.module.current_stream())
        memory.say(OPEN, memory.pulls)
        memory.hear(OPEN, memory.pulls)

    def __enter__(self) -> PeerExchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        current = self._memory.module.current_stream()
        for stream in (self._memory.pulls, self._memory.pushes):
            current.wait_stream(stream)

    def pull(self, plan: ExchangePlan) -> tuple[Tensor, Copied]:
        """Start to fetch the rows of a group of experts that this rank computes.

        Returns:
            The rows, expert by expert, in each source by source; and the work.

        Communication: copies out of the memory of the other ranks, the bytes of their rows.
        """
        memory, stream = self._memory, self._memory.pulls
        num_rows = sum(map(sum, plan.chunk_rows))
        arriving = self._like.new_empty(num_rows, self._like.shape[1])
        stream.wait_stream(memory.module.current_stream())
        for rank, there, here, count in self._chunks(plan):
            self._copy((arriving.data_ptr(), here), (memory.rows_at[rank], there), count, stream)
        return arriving, Copied(memory.module, stream)

    def push(self, terms_AM: Tensor, into: Tensor, plan: ExchangePlan) -> tuple[Tensor, Copied]:
        """Start to put terms of results where their tokens are, and to add up what arrives here.

        Args:
            terms_AM: contiguous, of the rows that :meth:`pull` brought, in their order.
            into: for the results of the rows that this rank sent, in theirs. Terms are added in
                the order of the ETP ranks and rounded once.
            plan: as for :meth:`pull`.

        Returns:
            ``into`` and the work.

        Communication: copies into the memory of the other ranks, the bytes of their results.
        """
        memory, stream = self._memory, self._memory.pushes
        here, me, first = terms_AM.data_ptr(), memory.rank, plan.first
        term = me % self._terms * memory.num_bytes
        to = [at + term for at in memory.results_at]
        chunks = list(self._chunks(plan))
        stream.wait_stream(memory.module.current_stream())
        for chunk in chunks:
            if chunk.rank != me:
                self._copy(
                    (to[chunk.rank], chunk.there), (here, chunk.here), chunk.num_rows, stream
                )
        phase, self._phases = self._phases[0], self._phases[::-1]
        memory.say(phase, stream)
        # A single term is the result: mine need not go by the shared memory.
        mine = (into.data_ptr(), -first) if self._terms == 1 else (to[me], 0)
        for chunk in chunks:
            if chunk.rank == me:
                place = (mine[0], mine[1] + chunk.there)
                self._copy(place, (here, chunk.here), chunk.num_rows, stream)
        memory.hear(phase, stream)
        self._take(into, plan, stream)
        return into, Copied(memory.module, stream)

    def _take(self, into: Tensor, plan: ExchangePlan, stream: Any) -> None:
        """What arrived, out of the shared memory."""
        memory = self._memory
        if self._terms > 1:
            with memory.module.stream(stream):
                torch.sum(self._arrived.narrow(1, plan.first, len(into)), 0, out=into)
            return
        start = 0
        for rank, count in enumerate(plan.dispatch_rows):
            if rank != memory.rank:
                of = (memory.results_at[memory.rank], plan.first + start)
                self._copy((into.data_ptr(), start), of, count, stream)
            start += count

    def _chunks(self, plan: ExchangePlan) -> Iterator[_Chunk]:
        """Of this rank's experts, beginning with the next rank: not all turn to the same one."""
        here: dict[int, list[int]] = {source: [] for source in range(len(plan.sources))}
        position = 0
        for rows in zip(*plan.chunk_rows):
            for source, count in enumerate(rows):
                here[source].append(position)
                position += count
        me, ranks = self._memory.rank, len(self._memory.ranks)
        for source in sorted(here, key=lambda s: (plan.sources[s] - me - 1) % ranks):
            there = plan.starts[source]
            for position, count in zip(here[source], plan.chunk_rows[source]):
                yield _Chunk(plan.sources[source], there, position, count)
                there += count

    def _copy(self, to: tuple[int, int], of: tuple[int, int], count: int, stream: Any) -> None:
        """So many rows, from and to an address and a row from there."""
        if count:
            (to_at, to_row), (of_at, of_row), size = to, of, self._row_bytes
            self._memory.streams.copy(
                to_at + to_row * size, of_at + of_row * size, count * size, stream
            )
