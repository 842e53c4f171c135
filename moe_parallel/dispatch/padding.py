"""Padding to capacity: shapes that nothing but the batch's size decides.

Every rank sends C rows to every expert, C = ceil(factor T k / E) with T the most tokens of a rank.
Where an assignment goes is known without asking the others::

    row = position of its expert * C + its number among the rank's assignments to this expert

Assignments numbered C and more are dropped: each rank counts capacity by itself, where without
padding all ranks count together. Rows without an assignment are zero, and so are their results. No
size depends on the routing, so nothing is copied to the host.

Example: E = 2, C = 2, k = 1, experts (0, 1, 0, 0) of 4 tokens::

    row of token      0, 2, 1, dropped (-1)
    token of row      0, 2, 1, none (-1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moe_parallel.config import MoEConfig
from moe_parallel.dispatch.permute import RowOrder
from moe_parallel.dispatch.plan import RowCounts
from moe_parallel.router.counts import AssignmentCounts, Routing, at_assignments, rows_before
from moe_parallel.router.route import expert_capacity
from moe_parallel.router.token_order import TokenOrder


class SentRows(NamedTuple):
    """The rows of a call, and how they leave.

    Attributes:
        order: of the rows that this rank sends.
        groups: experts of a rank, by group of the pipeline.
        wait: rows each rank of the token group sends to each expert.
        total: rows that all ranks send.
        most: no rank sends more.
        kept: what ``wait`` returns, on the device; None: it is not there.
    """

    order: RowOrder
    groups: tuple[range, ...]
    wait: Callable[[], RowCounts]
    total: int
    most: int
    kept: Tensor | None = None


def drop_by_rank(routing: Routing, capacity: int) -> tuple[Routing, Tensor]:
    """Keep the first ``capacity`` assignments of every (rank, expert), by position.

    Args:
        routing: dropless.
        capacity: C, the same on every rank.

    Returns:
        The routing with these drops, counts of all ranks included; and ``[T, k]`` int64,
        the number of each assignment among the rank's to its expert.

    Communication: none; what each rank keeps follows from the counts they have gathered.
    """
    assigned_RE = routing.counts.assigned
    before_ET = rows_before(routing.experts, assigned_RE.shape[1])
    number_Tk = at_assignments(before_ET - before_ET[:, :1], routing.experts)
    kept_RE = assigned_RE.clamp(max=capacity)
    dropped = routing._replace(
        mask=number_Tk < capacity,
        counts=AssignmentCounts(assigned_RE, kept_RE),
        histogram=None,
    )
    return dropped, number_Tk


def padded_order(
    positions_Tk: Tensor, number_Tk: Tensor, capacity: int, num_experts: int
) -> RowOrder:
    """``C`` rows for every expert, those that nobody fills -1.

    Args:
        positions_Tk: the position of each assignment's expert among the rows.
        number_Tk: of :func:`drop_by_rank`.
        capacity: C.
        num_experts: E.
    """
    row_Tk = positions_Tk * capacity + number_Tk
    row_Tk = row_Tk.masked_fill(number_Tk >= capacity, -1)
    return RowOrder(row_Tk, num_experts * capacity, padded=True)


def padded_rows(
    routing: Routing,
    config: MoEConfig,
    token_order: TokenOrder,
    groups_for: Callable[[int], tuple[tuple[range, ...], Tensor | None]],
) -> tuple[Routing, SentRows]:
    """As many rows for every expert: nothing is copied to the host.

    Args:
        routing: dropless.
        config: of the layer, with a capacity.
        token_order: where the tokens of every rank stand.
        groups_for: groups of a rank's experts for so many rows of all ranks, and the positions of
            all experts in the order of the rows; None: their numbers.
    """
    num_experts, factor = config.num_experts, config.capacity_factor or 0.0
    capacity = expert_capacity(factor, token_order.max_local_tokens, config.top_k, num_experts)
    routing, number_Tk = drop_by_rank(routing, capacity)
    most, ranks = capacity * num_experts, token_order.num_ranks
    groups, positions_E = groups_for(most * ranks)
    chosen_Tk = routing.experts if positions_E is None else positions_E[routing.experts]
    order = padded_order(chosen_Tk, number_Tk, capacity, num_experts)
    kept_RE = [[capacity] * num_experts] * ranks
    return routing, SentRows(order, groups, lambda: kept_RE, most * ranks, most)
