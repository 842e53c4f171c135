"""Which assignments a full expert drops, and what the ranks gather to agree on it.

Where assignments drop by position, ranks that train and ranks that do not send messages of one
size. The last number of a message tells the mode, so ranks learn that they differ, and none waits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.collectives import all_gather
from moe_parallel.router.counts import (
    AssignmentCounts,
    at_assignments,
    rows_before,
    tokens_of_ranks,
)
from moe_parallel.router.token_order import TokenOrder


def gathered_segments(
    counts_JE: Tensor, tokens_P: Tensor, training: int, token_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``[R, J, E]``, ``[R, P]`` and ``[R]`` of all ranks: their assignments, tokens and mode."""
    mode = counts_JE.new_full((1,), training)
    messages = all_gather(torch.cat([counts_JE.flatten(), tokens_P, mode]), token_group)
    counts, tokens_RP, mode_R1 = messages.split([counts_JE.numel(), len(tokens_P), 1], 1)
    counts_RJE = counts.unflatten(1, counts_JE.shape)
    return counts_RJE, tokens_RP if len(tokens_P) else None, mode_R1.squeeze(1)


def keep_by_position(
    experts_Tk: Tensor,
    num_experts: int,
    capacity: int,
    order: TokenOrder,
    rank: int,
    token_group: dist.ProcessGroup | None,
    num_ranks: int = 0,
) -> tuple[Tensor, AssignmentCounts]:
    """First come, first served in the global order.

    The place of an assignment in its expert's queue is the count of the expert in all earlier
    segments, of any rank, plus the count so far in its own segment.
    """
    before_ET = rows_before(experts_Tk, num_experts)
    bounds_J = order._segment_bounds(rank, experts_Tk.device)
    at_bounds_JE = before_ET[:, bounds_J].T.long()
    counts_JE, tokens_RP, training_R = at_bounds_JE.diff(dim=0), None, None
    if token_group is None:
        counts_RJE = counts_JE.unsqueeze(0)
    else:
        tokens_P = tokens_of_ranks(experts_Tk, num_experts, num_ranks).sum(0)
        gathered = gathered_segments(counts_JE, tokens_P, 1, token_group)
        counts_RJE, tokens_RP, training_R = gathered
    assigned_RE = counts_RJE.sum(1)

    by_position = order._segments_by_position(experts_Tk.device)
    queue_JE = counts_RJE.flatten(0, 1)[by_position]
    earlier_JE = torch.empty_like(queue_JE)
    earlier_JE[by_position] = queue_JE.cumsum(0) - queue_JE
    earlier_RJE = earlier_JE.view(counts_RJE.shape)
    kept_RE = torch.minimum(counts_RJE, (capacity - earlier_RJE).clamp(min=0)).sum(1)

    first_TE = torch.repeat_interleave(
        earlier_RJE[rank] - at_bounds_JE[:-1],
        bounds_J.diff(),
        dim=0,
        output_size=experts_Tk.shape[0],
    )
    place_Tk = first_TE.gather(1, experts_Tk) + at_assignments(before_ET, experts_Tk)
    counts = AssignmentCounts(assigned_RE, kept_RE, training_R, tokens_RP)
    return place_Tk < capacity, counts


def keep_by_probability(
    experts_Tk: Tensor,
    probabilities_Tk: Tensor,
    num_experts: int,
    capacity: int,
    order: TokenOrder,
    rank: int,
    token_group: dist.ProcessGroup | None,
    num_ranks: int = 0,
) -> tuple[Tensor, AssignmentCounts]:
    """Highest gate probability first, equal ones in the global order.

    Every rank gathers all assignments and sorts them alike: N k rows of memory and work a rank.
    """
    tokens, top_k = experts_Tk.shape
    ranks, most = order.num_ranks, order.max_local_tokens
    # An expert number is exact in float64 and so is a float32 probability: one message for both.
    mine = probabilities_Tk.new_zeros(most, top_k, 2, dtype=torch.float64)
    mine[:tokens, :, 0] = experts_Tk.double()
    mine[:tokens, :, 1] = probabilities_Tk.double()
    by_position = order._tokens_by_position(experts_Tk.device)
    gathered_A2 = all_gather(mine, token_group).view(ranks * most, top_k, 2)[by_position]
    experts_A = gathered_A2[..., 0].long().flatten()
    probabilities_A = gathered_A2[..., 1].flatten()
    rank_N, tokens_RP = by_position.div(max(most, 1), rounding_mode="floor"), None
    if num_ranks:
        goes_NP = tokens_of_ranks(experts_A.view(-1, top_k), num_experts, num_ranks).long()
        tokens_RP = goes_NP.new_zeros(ranks, num_ranks).index_add_(0, rank_N, goes_NP)
    # (rank, expert) of every assignment as one number; sums of integers do not depend on order.
    pair_A = rank_N.repeat_interleave(top_k) * num_experts + experts_A
    zeros = experts_A.new_zeros(ranks * num_experts)
    assigned_RE = zeros.index_add(0, pair_A, torch.ones_like(pair_A)).view(ranks, num_experts)

    # Two stable sorts: by expert, within it by probability, within that by position.
    best_A = probabilities_A.sort(descending=True, stable=True).indices
    queue_A = best_A[experts_A[best_A].sort(stable=True).indices]
    place_A = torch.empty_like(queue_A)
    place_A[queue_A] = torch.arange(len(queue_A), device=queue_A.device)
    assigned_E = assigned_RE.sum(0)
    first_E = assigned_E.cumsum(0) - assigned_E
    kept_A = place_A - first_E[experts_A] < capacity
    kept_RE = zeros.index_add(0, pair_A, kept_A.long()).view(ranks, num_experts)

    kept_RTk = kept_A.new_zeros(ranks * most, top_k)
    kept_RTk[by_position] = kept_A.view(-1, top_k)
    kept_Tk = kept_RTk.view(ranks, most, top_k)[rank, :tokens]
    return kept_Tk, AssignmentCounts(assigned_RE, kept_RE, None, tokens_RP)
