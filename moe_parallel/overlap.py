"""Rows to the experts and back, with the communication under the products.

The experts of a rank are cut into groups. While one group is computed, rows of the next are on
their way to it (D), and results of the one before are on their way back (C)::

    ep       D0 D1 ....... C0 D2 ...... C1 ....... C2
    compute  .. E0 E0 E0 E0   E1 E1 E1 E1  E2 E2 E2 E2

With ETP there are two more stages, over a group of their own, beside EP's: each rank of the block
gathers the rows (A), and what it computes of them is summed where they came from (S)::

    ep       D0 D1 D2 .... D3 ......... C0 D4 ..... C1
    etp      .. A0 A1 .... S0 A2 ......... S1 A3
    compute  ..... E0 E0 E0   E1 E1 E1 E1    E2 E2 E2

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
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.exchange import ExchangePlan, Splits, plan_exchange, start_all_to_all
from moe_parallel.timeline import Lane, Timeline
from moe_parallel.topology import ExpertMesh

# What one all-to-all should carry at least. A group of 24 MiB computes for about 0.9 ms on an H100
# (6144 x 9216); in half of that the host of the measured machines hardly queues the next one.
LEAST_BYTES = 24 * 2**20

# Groups between rows and weights in a backward: so many of them hold what weights are made of.
BESIDE_LAG = 2

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
    work: dist.Work | None
    mark: int = -1


class Pipeline(NamedTuple):
    """One call's way to the experts and back.

    Attributes:
        experts: of each group, which of the rank's experts.
        plans: of each group, who sends how many rows to whom.
        ep_group: ranks that hold different experts; None is one rank.
        etp_group: ranks that hold different parts of the same experts; likewise.
        timeline: marks what ran when, or None.
    """

    experts: tuple[range, ...]
    plans: tuple[ExchangePlan, ...]
    ep_group: dist.ProcessGroup | None = None
    etp_group: dist.ProcessGroup | None = None
    timeline: Timeline | None = None

    def run(
        self, rows_AM: Tensor, compute: Compute, beside: Callable[[int], None] | None = None
    ) -> Tensor:
        """Send rows to their experts, compute, and send the results back.

        Args:
            rows_AM: ``[A, hidden]``, group by group, in each by EP rank, in each by expert.
            compute: of the number of a group and its rows, as ``chunk_rows`` of its plan lists
                them, to this rank's terms of the results, in the same order. With ETP the terms of
                all its ranks are summed.
            beside: of the number of a group that was computed, computes what no rank waits for.

        Returns:
            ``[A, hidden]``, the results, in the order of ``rows_AM``.

        Communication: for each group an all-to-all over EP there and one back, of the rows for
        other ranks; with ETP one over it there and one back, the rows times (etp_size - 1).
        """
        if self.ep_group is None and self.etp_group is None and len(self.plans) == 1:
            results = self._computed(compute, 0, rows_AM)
            if beside is not None:
                beside(0)
            return results
        results, count = torch.empty_like(rows_AM), len(self.plans)
        sizes = [sum(plan.dispatch_rows) for plan in self.plans]
        departing, returning = rows_AM.split(sizes), results.split(sizes)
        lag = 0 if self.etp_group is None else 1  # the stages of ETP are one group ahead or behind
        dispatched: dict[int, Transfer] = {}
        gathered: dict[int, Transfer] = {}
        scattered: dict[int, Transfer] = {}
        combined: deque[Transfer] = deque()
        # A round starts dispatch d, gather a, computes g and starts combine c; the first rounds
        # compute nothing, the last start nothing.
        for g in range(-1 - lag, count + lag):
            d, a, c = g + 1 + lag, g + lag, g - lag
            if d < count:
                dispatched[d] = self._dispatch(d, departing[d])
            if 0 <= a < count:
                gathered[a] = self._gather(a, self._arrived(dispatched.pop(a)))
            if 0 <= g < count:
                terms = self._computed(compute, g, self._arrived(gathered.pop(g)))
                scattered[g] = self._scatter(g, terms)
            if c >= 0:
                rows = self._summed(c, scattered.pop(c))
                combined.append(self._combine(c, rows, returning[c]))
                if len(combined) > 2:  # long over: what was sent need not be held any more
                    self._arrived(combined.popleft())
            if beside is not None and g >= BESIDE_LAG:
                beside(g - BESIDE_LAG)
        if beside is not None:
            for g in range(max(0, count + lag - BESIDE_LAG), count):
                beside(g)
        for transfer in combined:
            self._arrived(transfer)
        return results

    def _computed(self, compute: Compute, group: int, rows: Tensor) -> Tensor:
        with self.computing("experts", group, rows.device):
            return compute(group, rows)

    def computing(
        self, name: str, group: int, device: torch.device
    ) -> AbstractContextManager[None]:
        """Marks compute in the timeline, if there is one."""
        if self.timeline is None:
            return nullcontext()
        return self.timeline.computing(name, group, device)

    # ---- stages: what is started, and what it takes ----------------------------------------------

    def _dispatch(self, g: int, rows: Tensor) -> Transfer:
        return self.start("ep", "dispatch", g, rows, self.plans[g].dispatch)

    def _gather(self, g: int, rows: Tensor) -> Transfer:
        if self.etp_group is None:
            return Transfer(rows, rows, None)
        plan = self.plans[g]
        return self.start("etp", "all-gather", g, plan.repeated(rows), plan.gather)

    def _scatter(self, g: int, terms: Tensor) -> Transfer:
        if self.etp_group is None:
            return Transfer(terms, terms, None)
        return self.start("etp", "scatter", g, terms, self.plans[g].gather.back)

    def _summed(self, g: int, transfer: Transfer) -> Tensor:
        terms = self._arrived(transfer)
        return terms if self.etp_group is None else self.plans[g].summed(terms)

    def _combine(self, g: int, rows: Tensor, into: Tensor) -> Transfer:
        return self.start("ep", "combine", g, rows, self.plans[g].dispatch.back, into)

    def start(
        self,
        lane: Lane,
        name: str,
        g: int,
        rows: Tensor,
        splits: Splits,
        into: Tensor | None = None,
    ) -> Transfer:
        """Start one all-to-all over EP or ETP; rows stay where they are if that is one rank."""
        group = self.ep_group if lane == "ep" else self.etp_group
        if group is None:
            return Transfer(rows if into is None else into.copy_(rows), rows, None)
        mark = -1
        if self.timeline is not None:
            mark = self.timeline.queued(lane, name, g, rows.device)
        arriving, sent, work = start_all_to_all(rows, splits, group, into)
        if self.timeline is not None and rows.is_cuda:
            self.timeline.over(mark, work, rows.device)
        return Transfer(arriving, sent, work, mark)

    def _arrived(self, transfer: Transfer) -> Tensor:
        """The rows, once they are there: on a GPU the stream waits, not the host."""
        if transfer.work is not None:
            transfer.work.wait()
            if self.timeline is not None and not transfer.rows.is_cuda:
                self.timeline.over(transfer.mark, transfer.work, transfer.rows.device)
        return transfer.rows


def expert_groups(num_local: int, num_groups: int) -> tuple[range, ...]:
    """The rank's experts in groups as equal as can be, in order."""
    cuts = [num_local * group // num_groups for group in range(num_groups + 1)]
    return tuple(range(*cut) for cut in pairwise(cuts))


def groups_that_pay(num_local: int, rank_bytes: int, mesh: ExpertMesh) -> int:
    """Into how many groups to cut the experts of a rank, the same number on every rank.

    As many as there are experts, but so few that an all-to-all of a group carries ``LEAST_BYTES``
    on the average rank; one where nothing travels.

    Args:
        num_local: experts of a rank.
        rank_bytes: of the rows that the average rank sends.
        mesh: the EP x ETP block of this rank.
    """
    if mesh.ep_size * mesh.etp_size == 1:
        return 1
    return min(num_local, max(1, rank_bytes // LEAST_BYTES))


def plan_pipeline(
    kept_RE: Sequence[Sequence[int]], mesh: ExpertMesh, experts: Sequence[range]
) -> tuple[ExchangePlan, ...]:
    """The split sizes of each group of experts.

    Args:
        kept_RE: rows each rank of the token group sends to each expert, on the host.
        mesh: the EP x ETP block of this rank.
        experts: of each group, which of a rank's experts.
    """
    return tuple(plan_exchange(kept_RE, mesh, local) for local in experts)


def local_pipeline(counts: Sequence[int], timeline: Timeline | None = None) -> Pipeline:
    """Of rows that are with their experts already, ``counts`` for each."""
    total = (sum(counts),)
    plan = ExchangePlan(total, total, total, (tuple(counts),))
    return Pipeline((range(len(counts)),), (plan,), timeline=timeline)


def dispatch_places(num_experts: int, ep_size: int, experts: Sequence[range]) -> list[int]:
    """Of each expert of all ranks, its place in the order of :meth:`Pipeline.run`."""
    num_local = num_experts // ep_size
    order = [
        ep * num_local + local for group in experts for ep in range(ep_size) for local in group
    ]
    places = [0] * num_experts
    for place, expert in enumerate(order):
        places[expert] = place
    return places
