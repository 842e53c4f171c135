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

from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_parallel.dispatch.all_to_all import ExchangePlan, add_terms
from moe_parallel.dispatch.symmetric_memory import EVEN, ODD, OPEN, Copied, PeerRows


class _Chunk(NamedTuple):
    """The rows of one rank for one expert, in bytes.

    Attributes:
        rank: in the group of the memory.
        there: where they begin among the rows that the rank sends.
        here: where among those that arrive.
        size: of all of them.
    """

    rank: int
    there: int
    here: int
    size: int


class PeerExchange:
    """One call's rows on their way to other ranks and back; the call before is over.

    Args:
        peers: in the memory of the EP x ETP block, etp fastest.
        rows_AM: ``[A, M]``, contiguous, what this rank sends, group by group, in each by EP rank;
            in :meth:`PeerRows.place`, or copied there. They fit into what is reserved.
    """

    def __init__(self, peers: PeerRows, rows_AM: Tensor) -> None:
        self._memory, self._like = (memory := peers.memory), rows_AM
        self._row_bytes = rows_AM.element_size() * rows_AM.shape[1]
        self._chunks: dict[int, list[_Chunk]] = {}  # by group
        self._phases = cycle((EVEN, ODD))
        if rows_AM.is_cuda and torch.cuda.is_current_stream_capturing():
            memory.captured = True
        if not peers.hold(rows_AM):
            peers.place(len(rows_AM), rows_AM).copy_(rows_AM)
        memory.pulls.wait_stream(memory.module.current_stream())
        memory.say(OPEN, memory.pulls)
        memory.hear(OPEN, memory.pulls)

    def close(self) -> None:
        """The current stream waits for all copies: to be called however the call ends."""
        current = self._memory.module.current_stream()
        for stream in (self._memory.pulls, self._memory.pushes):
            current.wait_stream(stream)

    def pull(self, g: int, plan: ExchangePlan, after: Any = None) -> tuple[Tensor, Copied]:
        """Start to fetch the rows of a group of experts that this rank computes.

        Args:
            g: number of the group.
            plan: of the group.
            after: the current stream, if it is at hand: asking for it takes time.

        Returns:
            The rows, expert by expert, in each source by source; and the work.

        Communication: copies out of the memory of the other ranks, the bytes of their rows.
        """
        memory, stream = self._memory, self._memory.pulls
        arriving = self._like.new_empty(sum(map(sum, plan.chunk_rows)), self._like.shape[1])
        here, self._chunks[g] = arriving.data_ptr(), self._chunks_of(plan)
        stream.wait_stream(after or memory.module.current_stream())
        for rank, there, start, size in self._chunks[g]:
            memory.streams.copy(here + start, memory.rows_at[rank] + there, size, stream)
        return arriving, Copied(memory.module, stream)

    def push(
        self, g: int, terms_AM: Tensor, into: Tensor, plan: ExchangePlan, after: Any = None
    ) -> tuple[Tensor, Copied]:
        """Start to put terms of results where their tokens are, and to add up what arrives here.

        Args:
            g: number of a group that was pulled.
            terms_AM: contiguous, of the rows that :meth:`pull` brought, in their order.
            into: for the results of the rows that this rank sent, in theirs.
            plan: of the group.
            after: as for :meth:`pull`.

        Returns:
            ``into`` and the work.

        Communication: copies into the memory of the other ranks, the bytes of their results.
        """
        memory, stream, me = self._memory, self._memory.pushes, self._memory.rank
        here, terms, chunks = terms_AM.data_ptr(), len(plan.etp_rows), self._chunks.pop(g)
        term = me % terms * memory.num_bytes
        stream.wait_stream(after or memory.module.current_stream())
        for rank, there, start, size in chunks:
            if rank != me:
                to = memory.results_at[rank] + term + there
                memory.streams.copy(to, here + start, size, stream)
        phase = next(self._phases)
        memory.say(phase, stream)
        # A single term is the result: mine need not go by the shared memory.
        mine = into.data_ptr() - plan.first * self._row_bytes
        mine = mine if terms == 1 else memory.results_at[me] + term
        for rank, there, start, size in chunks:
            if rank == me:
                memory.streams.copy(mine + there, here + start, size, stream)
        memory.hear(phase, stream)
        self._take(into, plan, stream)
        return into, Copied(memory.module, stream)

    def _take(self, into: Tensor, plan: ExchangePlan, stream: Any) -> None:
        """What arrived, out of the shared memory."""
        memory, terms = self._memory, len(plan.etp_rows)
        if terms > 1:
            with memory.module.stream(stream):
                results = memory.results(len(self._like), self._like)
                add_terms(results[:terms].narrow(1, plan.first, len(into)), into)
            return
        of, to = memory.results_at[memory.rank] + plan.first * self._row_bytes, into.data_ptr()
        start = 0
        for rank, count in enumerate(plan.dispatch_rows):
            size = count * self._row_bytes
            if rank != memory.rank and size:
                memory.streams.copy(to + start, of + start, size, stream)
            start += size

    def _chunks_of(self, plan: ExchangePlan) -> list[_Chunk]:
        """Of this rank's experts, beginning with the next rank: not all turn to the same one."""
        here, found = 0, []
        there = [start * self._row_bytes for start in plan.starts]
        for rows in zip(*plan.chunk_rows):
            for source, num_rows in enumerate(rows):
                size = num_rows * self._row_bytes
                if size:
                    found.append(_Chunk(plan.sources[source], there[source], here, size))
                there[source] += size
                here += size
        me, ranks = self._memory.rank, len(self._memory.ranks)
        return sorted(found, key=lambda chunk: (chunk.rank - me - 1) % ranks)
