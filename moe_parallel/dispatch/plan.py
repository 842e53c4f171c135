"""Who sends how many rows to whom: split sizes of a call, planned on the host.

Every split size is uneven, may be zero, and follows from the counts that the router gathered, which
every rank has. So ranks agree on all sizes without asking each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from moe_parallel.mesh import ExpertMesh

RowCounts = Sequence[Sequence[int]]  # [R, E]: rows each rank keeps for each expert, on the host


def checked_rows(wait: Callable[[], RowCounts], max_rows: int, mesh: ExpertMesh) -> RowCounts:
    """The counts; ValueError, on every rank of the block alike, if one would take too many rows.

    Args:
        wait: returns the rows each rank of the token group sends to each expert.
        max_rows: most rows for the experts of one rank.
        mesh: the EP x ETP block of this rank.
    """
    kept_RE = wait()
    num_local = len(kept_RE[0]) // mesh.ep_size
    for ep_rank in range(mesh.ep_size):
        experts = slice(ep_rank * num_local, (ep_rank + 1) * num_local)
        rows = sum(sum(kept_RE[source][experts]) for source in mesh.sources)
        if rows > max_rows:
            raise ValueError(
                f"max_rows must be at least the rows that the experts of EP rank {ep_rank} are to"
                f" take, got {max_rows} for {rows}: set a capacity_factor, route fewer tokens a"
                " call, or allow more"
            )
    return kept_RE


class Splits(NamedTuple):
    """Rows to and from each rank of a group in one all-to-all."""

    send: tuple[int, ...]
    receive: tuple[int, ...]

    @property
    def back(self) -> Splits:
        """The splits of the opposite direction."""
        return Splits(self.receive, self.send)


class ExchangePlan(NamedTuple):
    """Split sizes of one group of experts, in rows; host data.

    Attributes:
        first: index of the group's first row among the rows that this rank sends.
        dispatch_rows: to each EP rank.
        receive_rows: from each EP rank.
        etp_rows: dispatched rows held by each ETP rank of this block.
        chunk_rows: the gathered rows in chunks: ``chunk_rows[c][e]`` for source c = etp * ep_size
            + ep, and local expert e. They arrive source by source, expert by expert within it.
        sources: for each source its rank in the EP x ETP block, etp fastest.
        starts: for each source the index of its first row for this rank among the rows it sends.
    """

    first: int
    dispatch_rows: tuple[int, ...]
    receive_rows: tuple[int, ...]
    etp_rows: tuple[int, ...]
    chunk_rows: tuple[tuple[int, ...], ...]
    sources: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def dispatch(self) -> Splits:
        """Splits over EP; ``back`` is the combine."""
        return Splits(self.dispatch_rows, self.receive_rows)

    @property
    def gather(self) -> Splits:
        """Splits over ETP of rows repeated once a rank; ``back`` scatters the partial sums."""
        return Splits((sum(self.receive_rows),) * len(self.etp_rows), self.etp_rows)

    @property
    def expert_rows(self) -> tuple[int, ...]:
        """Rows of each local expert after the gather."""
        return tuple(sum(rows) for rows in zip(*self.chunk_rows))

    def group_by_expert(self, rows_AM: Tensor) -> Tensor:
        """Gathered rows, source-major, to expert-major; within an expert by source, then token."""
        return _transpose_chunks(rows_AM, self.chunk_rows)

    def group_by_source(self, rows_AM: Tensor) -> Tensor:
        """Inverse of :meth:`group_by_expert`."""
        return _transpose_chunks(rows_AM, tuple(zip(*self.chunk_rows)))


def plan_exchange(
    kept_RE: RowCounts,
    mesh: ExpertMesh,
    local: range | None = None,
    sent: Sequence[int] | None = None,
) -> ExchangePlan:
    """Split sizes for this rank out of the counts of all ranks.

    Args:
        kept_RE: rows each rank of the token group sends to each expert, on the host.
        mesh: the EP x ETP block of this rank.
        local: plan only the rows of these experts of each rank, counted on the rank; None: all.
        sent: rows that each source sends before these; None: none.
    """
    num_local = len(kept_RE[0]) // mesh.ep_size
    local = range(num_local) if local is None else local

    def rows(token_rank: int, ep_rank: int) -> tuple[int, ...]:
        expert = ep_rank * num_local
        return tuple(kept_RE[token_rank][expert + local.start : expert + local.stop])

    chunk_rows = tuple(rows(token_rank, mesh.ep_rank) for token_rank in mesh.sources)
    received = [sum(chunk) for chunk in chunk_rows]
    starts = [0] * len(received) if sent is None else list(sent)
    first = starts[mesh.sources.index(mesh.token_rank)]
    for source, token_rank in enumerate(mesh.sources):
        starts[source] += sum(sum(rows(token_rank, before)) for before in range(mesh.ep_rank))
    by_etp = [received[i : i + mesh.ep_size] for i in range(0, len(received), mesh.ep_size)]
    return ExchangePlan(
        first=first,
        dispatch_rows=tuple(sum(rows(mesh.token_rank, ep)) for ep in range(mesh.ep_size)),
        receive_rows=tuple(by_etp[mesh.etp_rank]),
        etp_rows=tuple(sum(block) for block in by_etp),
        chunk_rows=chunk_rows,
        sources=tuple(
            ep * mesh.etp_size + etp for etp in range(mesh.etp_size) for ep in range(mesh.ep_size)
        ),
        starts=tuple(starts),
    )


def _transpose_chunks(rows_AM: Tensor, chunk_rows: RowCounts) -> Tensor:
    """Chunks (i, j), i slowest, to (j, i), j slowest."""
    outer, inner = len(chunk_rows), len(chunk_rows[0])
    if 1 in (outer, inner):
        return rows_AM
    chunks = rows_AM.split([rows for row in chunk_rows for rows in row])
    return torch.cat([chunks[i * inner + j] for j, i in product(range(inner), range(outer))])


class GroupPlans(Sequence[ExchangePlan]):
    """The plan of each group of experts, made when it is first asked for.

    Rows of the first group leave before those of the last are counted, and a call is prepared
    before any are.

    Args:
        kept_RE: called once: rows each rank of the token group sends to each expert.
        mesh: the EP x ETP block of this rank.
        experts: for each group the experts of a rank.
    """

    def __init__(
        self, kept_RE: Callable[[], RowCounts], mesh: ExpertMesh, experts: Sequence[range]
    ) -> None:
        self._wait, self._mesh, self._experts = kept_RE, mesh, experts
        self._made: list[ExchangePlan] = []
        self._sent = [0] * len(mesh.sources)  # rows of each source in the groups made so far

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, group: int) -> ExchangePlan:  # type: ignore[override]  # no slices
        if not 0 <= group < len(self._made):  # the common case is a plan that exists: it is fast
            group = range(len(self))[group]
        while len(self._made) <= group:
            self._make(self._experts[len(self._made)])
        return self._made[group]

    @cached_property
    def _kept_RE(self) -> RowCounts:
        return self._wait()

    def _make(self, local: range) -> None:
        self._made.append(plan_exchange(self._kept_RE, self._mesh, local, self._sent))
        for source, token_rank in enumerate(self._mesh.sources):
            kept_E = self._kept_RE[token_rank]
            for first in range(0, len(kept_E), len(kept_E) // self._mesh.ep_size):
                self._sent[source] += sum(kept_E[first + local.start : first + local.stop])
