"""Rows between the ranks of the EP x ETP block, as one plan and four stages.

    dispatch         all-to-all over EP      rows to the ranks of their experts
    gather_etp       all-gather over ETP     rows to every rank that holds a part of their experts
    scatter_etp      reduce-scatter, ETP     the parts' sum back to the rank that dispatched them
    combine          all-to-all over EP      rows back to the ranks of their tokens

Every split size is uneven, is known on every rank beforehand from the counts the router gathered,
and may be zero. All four are built from one all-to-all: gloo has no uneven all-gather, NCCL runs it
as broadcasts, and a reduce-scatter spelled as all-to-all and a local sum rounds once, the same from
run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.derivatives import Reference, refuse_transforms
from lasp._core.joint_backward import join_backward
from moe_parallel.mesh import ExpertMesh

_REFERENCE = Reference("moe_parallel.dispatch.all_to_all", "moe_parallel.reference.reference_moe")


class Splits(NamedTuple):
    """Rows to and from each rank of a group in one all-to-all."""

    send: tuple[int, ...]
    receive: tuple[int, ...]

    @property
    def back(self) -> Splits:
        """The other way."""
        return Splits(self.receive, self.send)


class ExchangePlan(NamedTuple):
    """Split sizes of one layer call, in rows; host data.

    Attributes:
        first: where among the rows that this rank sends these begin.
        dispatch_rows: to each EP rank.
        receive_rows: from each EP rank.
        etp_rows: dispatched rows held by each ETP rank of this block.
        chunk_rows: the gathered rows in chunks: ``chunk_rows[c][e]`` for source c = etp * ep_size
            + ep, and local expert e. They arrive source by source, expert by expert within it.
        sources: of each source its rank in the EP x ETP block, etp fastest.
        starts: of each source, where among the rows that it sends those for this rank begin.
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
        """Over EP; ``back`` is the combine."""
        return Splits(self.dispatch_rows, self.receive_rows)

    @property
    def gather(self) -> Splits:
        """Over ETP, of rows as :meth:`repeated` has them; ``back`` is the scatter of terms."""
        return Splits((sum(self.receive_rows),) * len(self.etp_rows), self.etp_rows)

    def repeated(self, rows_AM: Tensor) -> Tensor:
        """Rows once for each ETP rank: what the gather sends."""
        return rows_AM.expand(len(self.etp_rows), *rows_AM.shape).flatten(0, 1)

    def summed(self, terms_AM: Tensor) -> Tensor:
        """What the scatter brings, added up."""
        terms_TAM = terms_AM.unflatten(0, (len(self.etp_rows), sum(self.receive_rows)))
        return add_terms(terms_TAM)

    @property
    def expert_rows(self) -> tuple[int, ...]:
        """Rows of each local expert after the gather."""
        return tuple(sum(rows) for rows in zip(*self.chunk_rows))


def plan_exchange(
    kept_RE: Sequence[Sequence[int]],
    mesh: ExpertMesh,
    local: range | None = None,
    sent: Sequence[int] | None = None,
) -> ExchangePlan:
    """Split sizes for this rank out of the counts of all ranks.

    Args:
        kept_RE: rows each rank of the token group sends to each expert, on the host.
        mesh: the EP x ETP block of this rank.
        local: only the rows of these experts of each rank, counted on the rank; None: of all.
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


def dispatch(rows_AM: Tensor, plan: ExchangePlan, ep_group: dist.ProcessGroup | None) -> Tensor:
    """Send rows, grouped by expert, to the EP ranks of their experts.

    Returns:
        Rows from EP rank 0 first, then 1, ...; each grouped by local expert.

    Gradients: the same all-to-all with its splits swapped.

    Communication: all-to-all over ``ep_group``, the bytes of the rows for other ranks.
    """
    return _all_to_all(rows_AM, plan.dispatch, ep_group)


def gather_etp(rows_AM: Tensor, plan: ExchangePlan, etp_group: dist.ProcessGroup | None) -> Tensor:
    """Give every ETP rank the dispatched rows of all, in ETP rank order.

    Gradients: the sum over ETP ranks (:func:`scatter_etp`).

    Communication: all-to-all over ``etp_group``, the rows times (etp_size - 1).
    """
    if etp_group is None:
        return rows_AM
    return _all_to_all(plan.repeated(rows_AM), plan.gather, etp_group)


def scatter_etp(rows_AM: Tensor, plan: ExchangePlan, etp_group: dist.ProcessGroup | None) -> Tensor:
    """Sum the ETP ranks' terms of every row on the rank that dispatched it.

    Sums are rounded once to the dtype of the rows, and the same from run to run.

    Gradients: gathered from all ETP ranks (:func:`gather_etp`).

    Communication: all-to-all over ``etp_group``, the rows times (etp_size - 1).
    """
    if etp_group is None:
        return rows_AM
    return plan.summed(_all_to_all(rows_AM, plan.gather.back, etp_group))


def combine(rows_AM: Tensor, plan: ExchangePlan, ep_group: dist.ProcessGroup | None) -> Tensor:
    """Send rows back the way :func:`dispatch` brought them; the same order of rows.

    Gradients: the same all-to-all with its splits swapped.

    Communication: all-to-all over ``ep_group``, the bytes of the rows for other ranks.
    """
    return _all_to_all(rows_AM, plan.dispatch.back, ep_group)


def group_by_expert(rows_AM: Tensor, plan: ExchangePlan) -> Tensor:
    """Gathered rows, source-major, to expert-major; within an expert by source, then by token."""
    return _transpose_chunks(rows_AM, plan.chunk_rows)


def group_by_source(rows_AM: Tensor, plan: ExchangePlan) -> Tensor:
    """Inverse of :func:`group_by_expert`."""
    return _transpose_chunks(rows_AM, tuple(zip(*plan.chunk_rows)))


def _transpose_chunks(rows_AM: Tensor, chunk_rows: Sequence[Sequence[int]]) -> Tensor:
    """Chunks (i, j), i slowest, to (j, i), j slowest."""
    outer, inner = len(chunk_rows), len(chunk_rows[0])
    if 1 in (outer, inner):
        return rows_AM
    chunks = rows_AM.split([rows for row in chunk_rows for rows in row])
    return torch.cat([chunks[i * inner + j] for j, i in product(range(inner), range(outer))])


def start_all_to_all(
    rows_AM: Tensor, splits: Splits, group: dist.ProcessGroup, into: Tensor | None = None
) -> tuple[Tensor, dist.Work]:
    """Start sending contiguous rows, to be held until the work is over.

    Returns:
        What arrives, in ``into`` if it is given, and the work.
    """
    if into is None:
        into = rows_AM.new_empty(sum(splits.receive), *rows_AM.shape[1:])
    work = dist.all_to_all_single(
        into, rows_AM, list(splits.receive), list(splits.send), group=group, async_op=True
    )
    return into, work


def add_terms(terms: Tensor, into: Tensor | None = None) -> Tensor:
    """``[ETP, A, M]`` added up in float32 or wider and rounded once, the same from run to run."""
    if len(terms) == 2:  # as below, but torch's sums of two are slow
        return torch.add(*terms, out=into)
    return torch.sum(terms, 0, out=into)


def _all_to_all(rows_AM: Tensor, splits: Splits, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return rows_AM
    refuse_transforms(_REFERENCE, rows_AM)
    rows_AM = join_backward(group, rows_AM)
    received: Tensor = _AllToAll.apply(rows_AM, splits, group)  # type: ignore[no-untyped-call]
    return received


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; its transpose is itself with the splits swapped."""

    @staticmethod
    def forward(ctx: Any, rows_AM: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = splits, group
        received, work = start_all_to_all(rows_AM.contiguous(), splits, group)
        work.wait()
        return received

    @staticmethod
    def backward(ctx: Any, grad_AM: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad_AM, ctx.splits.back, ctx.group), None, None
