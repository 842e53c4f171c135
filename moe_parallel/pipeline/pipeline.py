"""Rows to the experts and back, with the communication under the products.

The experts of a rank are cut into groups. While one group is computed, rows of the next two (while
it is the first, of one) are on their way to it (D), and results of the one before on their way back
(C)::

    ep       D0 D1 ....... C0 D2 D3 ... C1 ....... C2
    compute  .. E0 E0 E0 E0   E1 E1 E1 E1  E2 E2 E2 E2

With ETP there are two more stages, over a group of their own, beside EP's: each rank of the block
gathers the rows (A), and what it computes of them is summed where they came from (S)::

    ep       D0 D1 D2 D3 . D4 ......... C0 D5 ..... C1
    etp      .. A0 A1 .... S0 A2 ......... S1 A3
    compute  ..... E0 E0 E0   E1 E1 E1 E1    E2 E2 E2

Through the memory of peers rows come from all ranks of the block at once, and these two stages are
not there. On GPUs groups are computed on two streams in turn
(:mod:`moe_parallel.pipeline.streams`).

Groups are of experts, not of tokens: each expert is multiplied once, with all its rows, so results
have the same bits for any number of groups, and no weight gradient is added up from parts. The
backward is the same pipeline with gradients for rows. No rank waits for weight gradients: those of
a group come two groups later, and the last ones under the way home of the last rows.

All collectives are started by one thread, in an order that follows from the number of groups alone:
it is the same on every rank, across both process groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.dispatch.all_to_all import (
    ExchangePlan,
    Splits,
    group_by_expert,
    group_by_source,
    plan_exchange,
    start_all_to_all,
)
from moe_parallel.dispatch.copy_engine import PeerExchange
from moe_parallel.dispatch.symmetric_memory import Copied, PeerRows
from moe_parallel.mesh import ExpertMesh
from moe_parallel.pipeline.schedule import steps
from moe_parallel.pipeline.streams import TurnStreams
from moe_parallel.pipeline.timeline import Lane, Timeline

Compute = Callable[[int, Tensor], Tensor]


class Transfer(NamedTuple):
    """Rows on their way.

    Attributes:
        rows: those that arrive, to be read after ``wait``.
        sent: held until then.
        work: None where nothing had to move.
        mark: its number in the timeline.
    """

    rows: Tensor
    sent: Tensor
    work: dist.Work | Copied | None
    mark: int = -1


class Pipeline(NamedTuple):
    """One call's way to the experts and back.

    Attributes:
        experts: of each group, which of the rank's experts.
        plans: of each group, who sends how many rows to whom.
        ep_group: ranks that hold different experts; None is one rank.
        etp_group: ranks that hold different parts of the same experts; likewise.
        peers: in the memory of the EP x ETP block, through which rows travel; None: by all-to-all.
        timeline: marks what ran when, or None.
    """

    experts: tuple[range, ...]
    plans: Sequence[ExchangePlan]
    ep_group: dist.ProcessGroup | None = None
    etp_group: dist.ProcessGroup | None = None
    peers: PeerRows | None = None
    timeline: Timeline | None = None

    def run(
        self, rows_AM: Tensor, compute: Compute, beside: Callable[[int], None] | None = None
    ) -> Tensor:
        """Send rows to their experts, compute, and send the results back.

        Args:
            rows_AM: ``[A, hidden]``, group by group, in each by EP rank, in each by expert.
            compute: of the number of a group and its rows, expert by expert, to this rank's terms
                of the results, in the same order. With ETP the terms of all its ranks are summed.
            beside: of the number of a group that was computed, computes what no rank waits for.

        Returns:
            ``[A, hidden]``, the results, in the order of ``rows_AM``.

        Communication: for each group an all-to-all over EP there and one back, of the rows for
        other ranks; with ETP one over it there and one back, the rows times (etp_size - 1). Through
        ``peers`` copies of as many bytes.
        """
        if not self._travels and len(self.plans) == 1:
            results = self._computed(compute, 0, rows_AM)
            if beside is not None:
                beside(0)
            return results
        results, peers = torch.empty_like(rows_AM), None
        with ExitStack() as calls:
            streams = calls.enter_context(TurnStreams(rows_AM.device, len(self.plans)))
            self.plans[0]  # waits for the counts; where they are wrong all ranks raise
            if self.peers is not None:
                peers = calls.enter_context(closing(PeerExchange(self.peers, rows_AM)))
            self._in_turn(rows_AM, results, compute, beside, streams, peers)
        return results

    @property
    def _travels(self) -> bool:
        return not (self.ep_group is None and self.etp_group is None and self.peers is None)

    def _in_turn(
        self,
        rows_AM: Tensor,
        results: Tensor,
        compute: Compute,
        beside: Callable[[int], None] | None,
        streams: TurnStreams,
        peers: PeerExchange | None,
    ) -> None:
        """The steps of :meth:`run`."""
        under_way: dict[int, Transfer] = {}  # of each group what it is at
        combined: deque[tuple[int, Transfer]] = deque()
        for step, g in steps(len(self.plans), gathers=self._gathers, beside=beside is not None):
            stream = streams.turn(g)
            if step == "dispatch":
                under_way[g] = self._dispatch(g, self._of(g, rows_AM), peers, stream)
            elif step == "gather":
                under_way[g] = self._gather(g, self._arrived(under_way.pop(g), stream))
            elif step == "experts":
                terms = self._computed(compute, g, self._arrived(under_way.pop(g), stream))
                under_way[g] = self._scatter(g, terms)
            elif step == "combine":
                rows = self._summed(g, self._arrived(under_way.pop(g), stream))
                into = self._of(g, results)
                combined.append((g, self._combine(g, rows, into, peers, stream)))
                if len(combined) > 2:  # long over: what was sent need not be held any more
                    self._arrived(combined.popleft()[1], stream)
            elif beside is not None:
                beside(g)
        for g, transfer in combined:
            self._arrived(transfer, streams.turn(g))

    def _of(self, group: int, rows_AM: Tensor) -> Tensor:
        """The rows of a group that this rank sends."""
        plan = self.plans[group]
        return rows_AM.narrow(0, plan.first, sum(plan.dispatch_rows))

    def _computed(self, compute: Compute, group: int, rows: Tensor) -> Tensor:
        plan = self.plans[group]
        with self.computing("experts", group, rows.device):
            if self.peers is not None:  # they come in the order of the experts
                return compute(group, rows)
            return group_by_source(compute(group, group_by_expert(rows, plan)), plan)

    def computing(
        self, name: str, group: int, device: torch.device
    ) -> AbstractContextManager[None]:
        """Marks compute in the timeline, if there is one."""
        if self.timeline is None:
            return nullcontext()
        return self.timeline.computing(name, group, device)

    # ---- stages: what is started, and what it takes ----------------------------------------------

    def _dispatch(self, g: int, rows: Tensor, *ways: Any) -> Transfer:
        return self.start("ep", "dispatch", g, rows, self.plans[g].dispatch, None, *ways)

    @property
    def _gathers(self) -> bool:
        """Whether rows are gathered over ETP, and their terms summed, in stages of their own."""
        return self.etp_group is not None and self.peers is None

    def _gather(self, g: int, rows: Tensor) -> Transfer:
        if not self._gathers:
            return Transfer(rows, rows, None)
        plan = self.plans[g]
        return self.start("etp", "all-gather", g, plan.repeated(rows), plan.gather)

    def _scatter(self, g: int, terms: Tensor) -> Transfer:
        if not self._gathers:
            return Transfer(terms, terms, None)
        return self.start("etp", "scatter", g, terms, self.plans[g].gather.back)

    def _summed(self, g: int, terms: Tensor) -> Tensor:
        return self.plans[g].summed(terms) if self._gathers else terms

    def _combine(self, g: int, rows: Tensor, into: Tensor, *ways: Any) -> Transfer:
        return self.start("ep", "combine", g, rows, self.plans[g].dispatch.back, into, *ways)

    def start(
        self,
        lane: Lane,
        name: str,
        g: int,
        rows: Tensor,
        splits: Splits,
        into: Tensor | None = None,
        peers: PeerExchange | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> Transfer:  # all that an all-to-all, a pull and a push take: past 8 parameters
        """Start one all-to-all over EP or ETP; rows stay where they are if that is one rank."""
        group = self.ep_group if lane == "ep" else self.etp_group
        plan, rows = self.plans[g], rows.contiguous()
        mark = -1
        if self.timeline is not None and not (group is None and peers is None):
            mark = self.timeline.queued(lane, name, g, rows.device)
        work: dist.Work | Copied
        if peers is not None and into is None:
            arriving, work = peers.pull(g, plan, stream)
        elif peers is not None and into is not None:
            arriving, work = peers.push(g, rows, into, plan, stream)
        elif group is not None:
            arriving, work = start_all_to_all(rows, splits, group, into)
        else:
            return Transfer(rows if into is None else into.copy_(rows), rows, None)
        if self.timeline is not None and rows.is_cuda:
            self.timeline.over(mark, work, rows.device)
        return Transfer(arriving, rows, work, mark)

    def _arrived(self, transfer: Transfer, stream: torch.cuda.Stream | None) -> Tensor:
        """The rows, once they are there: on a GPU the stream, the current one, waits for them."""
        work = transfer.work
        if isinstance(work, Copied):
            work.wait(stream)
        elif work is not None:
            work.wait()
        if work is not None and self.timeline is not None and not transfer.rows.is_cuda:
            self.timeline.over(transfer.mark, work, transfer.rows.device)
        return transfer.rows


class PipelinePlans(Sequence[ExchangePlan]):
    """The split sizes of each group of experts, made when they are asked for.

    The first rows leave before the last are counted, and a call is prepared before any are.

    Args:
        kept_RE: asked once: rows each rank of the token group sends to each expert.
        mesh: the EP x ETP block of this rank.
        experts: of each group, which of a rank's experts.
    """

    def __init__(
        self,
        kept_RE: Callable[[], Sequence[Sequence[int]]],
        mesh: ExpertMesh,
        experts: Sequence[range],
    ) -> None:
        self._wait, self._mesh, self._experts = kept_RE, mesh, experts
        self._made: list[ExchangePlan] = []
        self._sent = [0] * len(mesh.sources)  # so far, by each of them

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, group: int) -> ExchangePlan:  # type: ignore[override]  # no slices
        if not 0 <= group < len(self._made):  # else asked before: often, and the host hurries
            group = range(len(self))[group]
        while len(self._made) <= group:
            self._make(self._experts[len(self._made)])
        return self._made[group]

    @cached_property
    def _kept_RE(self) -> Sequence[Sequence[int]]:
        return self._wait()

    def _make(self, local: range) -> None:
        self._made.append(plan_exchange(self._kept_RE, self._mesh, local, self._sent))
        for source, token_rank in enumerate(self._mesh.sources):
            kept_E = self._kept_RE[token_rank]
            for first in range(0, len(kept_E), len(kept_E) // self._mesh.ep_size):
                self._sent[source] += sum(kept_E[first + local.start : first + local.stop])


def local_pipeline(counts: Sequence[int], timeline: Timeline | None = None) -> Pipeline:
    """Of rows that are with their experts already, ``counts`` for each."""
    total = (sum(counts),)
    plan = ExchangePlan(0, total, total, total, (tuple(counts),), (0,), (0,))
    return Pipeline((range(len(counts)),), (plan,), timeline=timeline)
