"""The all-to-all dispatcher: rows between the ranks of the EP x ETP block in four stages.

    dispatch    all-to-all over EP      rows to the ranks of their experts
    gather      all-gather over ETP     rows to every rank that holds a part of their experts
    scatter     reduce-scatter, ETP     partial sums back to the rank that dispatched the row
    combine     all-to-all over EP      rows back to the ranks of their tokens

All four are built from one all-to-all. gloo has no uneven all-gather, and NCCL runs it as
broadcasts. A reduce-scatter as all-to-all and local sum rounds once, the same from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.collectives import all_gather_into
from lasp._core.impl import ChosenImpl
from moe_parallel.dispatch.dispatcher import Dispatch, EtpStages, Lane, RowTransfer
from moe_parallel.dispatch.plan import ExchangePlan, GroupPlans, RowCounts, Splits
from moe_parallel.dispatch.planned import ChunkCounts, PlannedDispatch
from moe_parallel.mesh import ExpertMesh

# A group should send at least this by NCCL, on average: with two thread blocks 8 groups of 96 MiB
# were faster than 16 of 48; without a limit they were the same.
LEAST_BYTES = 96 * 2**20
# With ETP more groups than these were slower at every size measured: each is two collectives more,
# with etp_size times the rows, whose thread blocks are not with the products.
MOST_WITH_ETP = 2


class AllToAllDispatcher:
    """Rows by all-to-alls over EP and ETP.

    Args:
        mesh: the EP x ETP block of this rank.
        ep_group: ranks that hold different experts; None is one rank.
        etp_group: ranks that hold different parts of the same experts; None is one rank.
    """

    def __init__(
        self,
        mesh: ExpertMesh,
        ep_group: dist.ProcessGroup | None,
        etp_group: dist.ProcessGroup | None,
    ) -> None:
        self._mesh, self._groups = mesh, (ep_group, etp_group)

    def __deepcopy__(self, memo: object) -> AllToAllDispatcher:
        """Itself: copies of a model, as for moving averages, work over the same ranks."""
        return self

    def overlap_groups(self, num_local: int, rank_bytes: int) -> int:
        """As many as experts, with ETP ``MOST_WITH_ETP``, each of ``LEAST_BYTES`` or more."""
        most = num_local if self._mesh.etp_size == 1 else min(num_local, MOST_WITH_ETP)
        return min(most, max(1, rank_bytes // LEAST_BYTES))

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
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatcher`."""
        plans = GroupPlans(kept_RE, self._mesh, experts)
        counts = ChunkCounts.of(kept, self._mesh, impl)
        return AllToAllDispatch(experts, plans, *self._groups, counts)


class AllToAllDispatch(PlannedDispatch):
    """One call of :class:`AllToAllDispatcher`.

    Communication: for each group and run an all-to-all over EP there and one back, the bytes of the
    rows for other ranks; with ETP one over it there and one back, the rows times (etp_size - 1).
    """

    def __init__(
        self,
        experts: tuple[range, ...],
        plans: Sequence[ExchangePlan],
        ep_group: dist.ProcessGroup | None,
        etp_group: dist.ProcessGroup | None,
        counts: ChunkCounts = ChunkCounts(),  # noqa: B008 (immutable)
    ) -> None:
        super().__init__(experts, plans, counts)
        self._ep_group = ep_group
        axes: tuple[tuple[Lane, dist.ProcessGroup | None], ...]
        axes = (("ep", ep_group), ("etp", etp_group))
        self.lanes = tuple(lane for lane, group in axes if group is not None)
        self.process_groups = tuple(group for _, group in axes if group is not None)
        if etp_group is not None:
            self.etp = AllToAllEtpStages(plans, etp_group)

    def dispatch(self, g: int, rows_AM: Tensor, stream: torch.cuda.Stream | None) -> RowTransfer:
        """Rows from EP rank 0 arrive first, then 1, ...; each grouped by local expert."""
        if self._ep_group is None:
            return RowTransfer(rows_AM, rows_AM)
        return start_all_to_all(rows_AM, self._plans[g].dispatch, self._ep_group)

    def gather(self, x_TM: Tensor) -> RowTransfer | None:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`; an all-gather."""
        if self._ep_group is None:
            return None
        x_TM = x_TM.contiguous()
        gathered = x_TM.new_empty(self._ep_group.size() * len(x_TM), x_TM.shape[1])
        work = all_gather_into(gathered, x_TM, group=self._ep_group, async_op=True)
        return RowTransfer(gathered, x_TM, lambda _: work.wait())

    def combine(
        self, g: int, rows_AM: Tensor, into: Tensor, stream: torch.cuda.Stream | None
    ) -> RowTransfer:
        """Rows back in the order in which :meth:`dispatch` took them."""
        if self._ep_group is None:
            return RowTransfer(into.copy_(rows_AM), rows_AM)
        return start_all_to_all(rows_AM, self._plans[g].dispatch.back, self._ep_group, into)


class AllToAllEtpStages(EtpStages):
    """Gather and scatter over ETP, each one all-to-all."""

    def __init__(self, plans: Sequence[ExchangePlan], group: dist.ProcessGroup) -> None:
        self._plans, self._group = plans, group

    def gather(self, g: int, rows_AM: Tensor) -> RowTransfer:
        """See :class:`moe_parallel.dispatch.dispatcher.EtpStages`."""
        plan = self._plans[g]
        repeated = rows_AM.expand(len(plan.etp_rows), *rows_AM.shape).flatten(0, 1)
        return start_all_to_all(repeated, plan.gather, self._group)

    def scatter(self, g: int, partial_AM: Tensor) -> RowTransfer:
        """See :class:`moe_parallel.dispatch.dispatcher.EtpStages`."""
        return start_all_to_all(partial_AM, self._plans[g].gather.back, self._group)

    def add_up(self, g: int, partial_AM: Tensor) -> Tensor:
        """See :class:`moe_parallel.dispatch.dispatcher.EtpStages`."""
        plan = self._plans[g]
        partial = partial_AM.unflatten(0, (len(plan.etp_rows), sum(plan.receive_rows)))
        return add_partial_sums(partial)


def start_all_to_all(
    rows_AM: Tensor, splits: Splits, group: dist.ProcessGroup, into: Tensor | None = None
) -> RowTransfer:
    """Start to send rows; they arrive in ``into`` if it is given."""
    rows_AM = rows_AM.contiguous()
    if into is None:
        into = rows_AM.new_empty(sum(splits.receive), *rows_AM.shape[1:])
    work = dist.all_to_all_single(
        into, rows_AM, list(splits.receive), list(splits.send), group=group, async_op=True
    )
    return RowTransfer(into, rows_AM, lambda _: work.wait())


def add_partial_sums(partial: Tensor, into: Tensor | None = None) -> Tensor:
    """``[ETP, A, M]`` added up in float32 or wider and rounded once, the same from run to run."""
    if len(partial) == 2:  # the same as below: torch's sums over two are slow
        return torch.add(*partial, out=into)
    return torch.sum(partial, 0, out=into)
