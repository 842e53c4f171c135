"""Rows to the experts and back, with the communication under the products.

The experts of a rank are cut into groups. While one group is computed, rows of the next two are on
their way to it (D), and results of the group before on their way back (C). Under the first group
only one dispatch runs::

    ep       D0 D1 ....... C0 D2 D3 ... C1 ....... C2
    compute  .. E0 E0 E0 E0   E1 E1 E1 E1  E2 E2 E2 E2

A dispatcher with stages over ETP adds two, over a process group of their own: each rank of the
block gathers the rows (A), and partial sums are scattered to where the rows came from (S)::

    ep       D0 D1 D2 D3 . D4 ......... C0 D5 ..... C1
    etp      .. A0 A1 .... S0 A2 ......... S1 A3
    compute  ..... E0 E0 E0   E1 E1 E1 E1    E2 E2 E2

On GPUs the groups are computed on two streams in turn (:mod:`moe_parallel.pipeline.streams`).

Groups are of experts, not of tokens: each expert is multiplied once, with all its rows. So results
have the same bits for any number of groups, and no weight gradient is added up from parts. The
backward is the same pipeline with gradients for rows. No rank waits for weight gradients: they
follow their group by two groups, the last ones while the last rows travel back.

One thread starts all collectives, in an order that follows from the number of groups alone: it is
the same on every rank, across both process groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_parallel.config import MoEConfig
from moe_parallel.dispatch.dispatcher import Dispatch, Dispatcher, Lane, LocalDispatch, RowTransfer
from moe_parallel.dispatch.padding import SentRows
from moe_parallel.dispatch.permute import row_order
from moe_parallel.mesh import ExpertMesh
from moe_parallel.pipeline.groups import expert_groups, most_groups, positions_on
from moe_parallel.pipeline.schedule import steps
from moe_parallel.pipeline.streams import TurnStreams
from moe_parallel.pipeline.timeline import Timeline
from moe_parallel.router.counts import HostTokenCounts, Routing
from moe_parallel.router.token_order import TokenOrder

Compute = Callable[[int, Tensor], Tensor]
WeightGradients = Callable[[int], None]
_NOTHING = nullcontext()
Groups = tuple[tuple[range, ...], Tensor | None]  # of a rank's experts, and positions of all


class Pipeline(NamedTuple):
    """Runs the rows of one call through the experts, in groups.

    Attributes:
        dispatch: moves the rows of this call.
        timeline: marks what ran when, or None.
    """

    dispatch: Dispatch
    timeline: Timeline | None = None

    def run(
        self, rows_AM: Tensor, compute: Compute, wgrad: WeightGradients | None = None
    ) -> Tensor:
        """Send rows to their experts, compute, and send the results back.

        Args:
            rows_AM: ``[A, hidden]``, group by group, in each by EP rank, in each by expert.
            compute: takes the number of a group and its rows, expert by expert, and returns this
                rank's partial sums of the results, in the same order. With ETP they are added up
                over its ranks.
            wgrad: takes the number of a group that was computed, and computes its weight gradients.

        Returns:
            ``[A, hidden]``, the results, in the order of ``rows_AM``.

        Communication: that of the dispatch, :mod:`moe_parallel.dispatch.dispatcher`.
        """
        dispatch = self.dispatch
        if not dispatch.lanes and len(dispatch.experts) == 1:
            results = self._computed(compute, 0, rows_AM)
            if wgrad is not None:
                wgrad(0)
            return results
        results = torch.empty_like(rows_AM)
        with ExitStack() as run:
            streams = run.enter_context(TurnStreams(rows_AM.device, len(dispatch.experts)))
            dispatch.open(rows_AM)
            run.callback(dispatch.close)
            self._in_turn(rows_AM, results, compute, wgrad, streams)
        return results

    def _in_turn(
        self,
        rows_AM: Tensor,
        results: Tensor,
        compute: Compute,
        wgrad: WeightGradients | None,
        streams: TurnStreams,
    ) -> None:
        """The steps of :meth:`run`."""
        dispatch, etp, wait = self.dispatch, self.dispatch.etp, self._wait
        under_way: dict[int, RowTransfer] = {}  # the last transfer of each group
        combined: deque[tuple[int, RowTransfer]] = deque()
        order = steps(len(dispatch.experts), gathers=etp is not None, wgrad=wgrad is not None)
        for step, g in order:
            stream = streams.turn(g)
            if step == "dispatch":
                rows = dispatch.own_rows(g, rows_AM)
                under_way[g] = self._start("ep", step, g, dispatch.dispatch, rows, stream)
            elif step == "gather" and etp is not None:
                rows = wait(under_way.pop(g), stream)
                under_way[g] = self._start("etp", "all-gather", g, etp.gather, rows)
            elif step == "experts":
                partial = self._computed(compute, g, wait(under_way.pop(g), stream))
                under_way[g] = RowTransfer(partial, partial)
                if etp is not None:
                    under_way[g] = self._start("etp", "scatter", g, etp.scatter, partial)
            elif step == "combine":
                rows, into = wait(under_way.pop(g), stream), dispatch.own_rows(g, results)
                rows = rows if etp is None else etp.add_up(g, rows)
                transfer = self._start("ep", step, g, dispatch.combine, rows, into, stream)
                combined.append((g, transfer))
                if len(combined) > 2:  # long over: what was sent need not be held any more
                    wait(combined.popleft()[1], stream)
            elif wgrad is not None:
                wgrad(g)
        for g, transfer in combined:
            wait(transfer, streams.turn(g))

    def _computed(self, compute: Compute, g: int, rows: Tensor) -> Tensor:
        dispatch = self.dispatch
        with self.computing("experts", g, rows.device):
            return dispatch.by_arrival(g, compute(g, dispatch.by_expert(g, rows)))

    def computing(
        self, name: str, group: int, device: torch.device
    ) -> AbstractContextManager[None]:
        """Marks compute in the timeline, if there is one."""
        if self.timeline is None:
            return _NOTHING
        return self.timeline.computing(name, group, device)

    def _start(
        self, lane: Lane, name: str, g: int, start: Callable[..., RowTransfer], *args: Any
    ) -> RowTransfer:
        """Start a transfer of a group, marked in the timeline if something travels in its lane."""
        timeline = self.timeline
        if timeline is None or lane not in self.dispatch.lanes:
            return start(g, *args)
        device = args[0].device
        mark = timeline.queued(lane, name, g, device)
        transfer = start(g, *args)
        if device.type == "cuda" and transfer.wait is not None:
            timeline.over(mark, transfer.wait, device)
        return transfer._replace(mark=mark)

    def _wait(self, transfer: RowTransfer, stream: torch.cuda.Stream | None) -> Tensor:
        """The rows, once they are there: on a GPU the stream, the current one, waits for them."""
        if transfer.wait is not None:
            transfer.wait(stream)
            if self.timeline is not None and not transfer.rows.is_cuda:
                self.timeline.over(transfer.mark, transfer.wait, transfer.rows.device)
        return transfer.rows


def local_pipeline(counts: Sequence[int], timeline: Timeline | None = None) -> Pipeline:
    """A pipeline for rows that are with their experts already, ``counts`` for each expert."""
    return Pipeline(LocalDispatch((range(len(counts)),), lambda: counts), timeline)


def call_groups(
    config: MoEConfig, mesh: ExpertMesh, dispatcher: Dispatcher, num_rows: int, like: Tensor
) -> Groups:
    """Groups of a rank's experts for a call, and the positions of all experts; None: their numbers.

    Args:
        config: of the layer.
        mesh: the EP x ETP block of this rank.
        dispatcher: of the layer, whose rule holds where the config has no number of groups.
        num_rows: that all ranks send.
        like: a tensor of the rows' dtype.
    """
    num_local, num_groups = config.num_experts // mesh.ep_size, config.overlap_groups
    sizes = (config.hidden_size, config.ffn_size)
    if num_groups is None:
        rank_rows = num_rows // mesh.num_token_ranks
        rank_bytes = rank_rows * like.element_size() * sizes[0]
        num_groups = dispatcher.overlap_groups(num_local, rank_bytes)
        if num_groups > 1:
            num_groups = min(num_groups, most_groups(rank_rows, *sizes))
    groups = expert_groups(num_local, num_groups)
    if num_groups == 1:
        return groups, None
    return groups, positions_on(like.device, config.num_experts, mesh.ep_size, groups)


def kept_rows(
    routing: Routing,
    config: MoEConfig,
    mesh: ExpertMesh,
    token_order: TokenOrder,
    groups_for: Callable[[int], Groups],
    chosen_gemm: Callable[[int], str],
) -> SentRows:
    """One row for each kept assignment.

    Args:
        routing: the decision for this rank's tokens.
        config: of the layer.
        mesh: the EP x ETP block of this rank.
        token_order: where the tokens of every rank stand.
        groups_for: :func:`call_groups` for so many rows of all ranks.
        chosen_gemm: how a rank's experts multiply so many rows. On one rank a grouped product needs
            no counts, and with ``static_shapes`` nobody does: they go to the host where somebody
            asks for them, if at all.
    """
    late = config.static_shapes
    if not late and mesh.num_token_ranks == 1 and config.overlap_groups in (None, 1):
        late = routing.dropless and config.max_rows is None
        late = late and chosen_gemm(routing.experts.numel()) == "grouped"
    counts = HostTokenCounts(routing, token_order, start=not late)
    total = counts.of_all()
    groups, positions_E = groups_for(total)
    order = row_order(
        routing.experts,
        routing.mask,
        counts.of_rank(mesh.token_rank),
        config.num_experts,
        histogram=routing.histogram,
        positions_E=positions_E,
        with_ends=mesh.num_token_ranks == len(groups) == 1,
    )
    return SentRows(order, groups, counts.wait, total, counts.most, routing.counts.kept)
