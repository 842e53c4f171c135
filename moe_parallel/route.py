"""The global router: which experts each token goes to, and which assignments are dropped.

One decision for all tokens of the token group (every rank of a pipeline stage), so that it does not
depend on how the tokens are split over data, context or expert parallel ranks. What the ranks must
tell each other is gathered before any token travels, in one collective:

    dropless               counts of every expert                  E x 8 bytes a rank
    drop by position       counts of every (segment, expert)       J x E x 8 + 8 bytes a rank
    drop by probability    (expert, probability) of assignments    T x k x 16 bytes a rank

Source: MiniMax-01 sections 2.1 (equation 1, auxiliary loss, global router); GShard for the loss.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.counting import Tally, at_assignments, counted, rows_before
from moe_parallel.impl import ChosenImpl
from moe_parallel.order import TokenOrder
from moe_parallel.top_k import choose

DropPolicy = Literal["position", "probability"]

# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class RoutingStats(NamedTuple):
    """Expert balance over the whole token group; the same on every rank, on the device.

    Attributes:
        assigned: ``[E]``, assignments of each expert before drop, int64.
        dropped: ``[E]``, of these, how many exceeded the capacity, int64.
    """

    assigned: Tensor
    dropped: Tensor


class AssignmentCounts(NamedTuple):
    """Assignments of every rank of the token group to every expert, ``[R, E]`` int64.

    Attributes:
        assigned: before drop.
        kept: after drop; without drops the same tensor.
        training: ``[R]`` int64, 1 for ranks that drop and 0 for ranks that do not, where ranks must
            be asked; else None.
    """

    assigned: Tensor
    kept: Tensor
    training: Tensor | None = None


class Routing(NamedTuple):
    """The decision for this rank's T tokens.

    Attributes:
        experts: ``[T, k]``, chosen experts, best first, int64.
        weights: ``[T, k]``, softmax over the k chosen logits, gate dtype, differentiable. Dropped
            assignments keep their weight here; the kept ones are not renormalised.
        mask: ``[T, k]``, False where the assignment is dropped; None if none can be.
        counts: of all ranks.
        logits: ``[T, E]``, gate dtype, differentiable.
        num_tokens: N, of all ranks.
        aux_loss_coefficient: as given.
        tally: this rank's assignments as kernels have counted them; None by plain torch, and with
            drops, where it counts too many.
    """

    experts: Tensor
    weights: Tensor
    mask: Tensor | None
    counts: AssignmentCounts
    logits: Tensor
    num_tokens: int
    aux_loss_coefficient: float
    tally: Tally | None = None

    @property
    def dropless(self) -> bool:
        """No assignment can be dropped: known on the host, as their numbers then are."""
        return self.mask is None

    # No token waits for these three: they are made whenever they are asked for. Ask once.
    @property
    def kept(self) -> Tensor:
        """``[T, k]``, False where the assignment is dropped."""
        return torch.ones_like(self.experts, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def stats(self) -> RoutingStats:
        """Balance over all ranks."""
        assigned_E = self.counts.assigned.sum(0)
        return RoutingStats(assigned_E, assigned_E - self.counts.kept.sum(0))

    @property
    def aux_loss(self) -> Tensor:
        """This rank's share of the auxiliary loss, a scalar in the gate dtype."""
        if not self.aux_loss_coefficient:
            return self.logits.new_zeros(())
        return self.balance_loss(self.counts.assigned.sum(0), self.num_tokens)

    def balance_loss(self, assigned_E: Tensor, num_tokens: int) -> Tensor:
        """The same, with f_i of the assignments of more tokens: of several micro-batches."""
        assignments = max(num_tokens, 1) * self.experts.shape[1]  # without tokens 0, not 0 / 0
        fraction_E = assigned_E.to(self.logits.dtype) / assignments
        share_E = self.logits.softmax(1).sum(0) / max(self.num_tokens, 1)
        return self.aux_loss_coefficient * len(assigned_E) * (fraction_E * share_E).sum()


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Most assignments an expert keeps: ceil(factor * N * k / E), N over the whole token group."""
    return math.ceil(capacity_factor * num_tokens * top_k / num_experts)


def check_drop(capacity_factor: float | None, drop_policy: str) -> None:
    """Raise ValueError for a capacity factor or policy that :func:`route` does not know."""
    if capacity_factor is not None and not 0 < capacity_factor < math.inf:
        raise ValueError(
            f"capacity_factor must be > 0, or None for dropless routing, got {capacity_factor}"
        )
    if drop_policy not in get_args(DropPolicy):
        raise ValueError(f"drop_policy must be one of {get_args(DropPolicy)}, got {drop_policy!r}")


def route(  # longer than our functions are, and of ten arguments: the contract of the router
    x_TM: Tensor,
    gate_EM: Tensor,
    *,
    top_k: int,
    order: TokenOrder,
    token_group: dist.ProcessGroup | None = None,
    capacity_factor: float | None = None,
    drop_policy: DropPolicy = "position",
    aux_loss_coefficient: float = 0.0,
    impl: ChosenImpl = "eager",
    training: bool = True,
) -> Routing:
    """Route this rank's tokens under a decision shared by all ranks of ``token_group``.

    Gate: logits = x gate^T; the k largest are chosen (equal logits: the lower expert first), the
    weights are the softmax over the chosen logits. In float32 or wider, under autocast too, by
    :func:`moe_parallel.top_k.choose`.

    Capacity: an expert keeps at most C = ceil(capacity_factor * N * k / E) assignments of the N
    tokens of all ranks. ``position`` keeps those that come first in the global order (an expert is
    chosen at most once a token, so slots never compete); ``probability`` keeps those with the
    highest gate probability (softmax over all E logits), equal ones by position. A dropped
    assignment is not dispatched and adds nothing to the output.

    How the tokens are split does not enter these rules. It enters the last bits of the logits, as
    any change of a matrix product's shape does, so only a tie to rounding can fall another way.

    Auxiliary loss, global: coefficient * E * sum_i f_i m_i, with f_i expert i's part of the N k
    assignments before drop, and m_i the mean of its gate probability over the N tokens. It is
    coefficient at perfect balance. MiniMax writes alpha * (1/E) * sum_i f_i m_i: for that, set
    coefficient = alpha / E^2 (alpha * k / E^2 if f_i counts assignments per token).

    Args:
        x_TM: routed tokens of this rank, by global position; any float dtype.
        gate_EM: gate weight, the same on every rank.
        top_k: k, experts a token.
        order: where every rank's tokens stand; equal on every rank.
        token_group: ranks that share the decision; None for this rank alone.
        capacity_factor: None is dropless.
        drop_policy: who is dropped when an expert is full.
        aux_loss_coefficient: 0.01 in MiniMax-01's pre-training.
        impl: who chooses and counts; what is gathered does not depend on it.
        training: False drops nothing; must be equal on every rank. By position it rides along in
            the message, whose size does not depend on it, for :class:`KeptCounts` to check.

    Returns:
        :class:`Routing`. ``aux_loss`` is a share: its sum over the token group is the loss.

    Gradients: ``weights_Tk`` and ``aux_loss`` (with a coefficient of 0 a constant) to x and gate;
    counts have none. The gate's gradient is whole once summed over the token group.

    Communication: one all-gather over ``token_group``, see the top of this file; no host copy.
    """
    rank = 0 if token_group is None else dist.get_rank(token_group)
    num_experts = gate_EM.shape[0]
    logits_TE, experts_Tk, weights_Tk, tally = choose(x_TM, gate_EM, top_k, impl)

    kept_Tk: Tensor | None = None
    if capacity_factor is None or not training:
        assigned_E = counted(experts_Tk, num_experts) if tally is None else tally.totals
        asked = capacity_factor is not None and drop_policy == "position"
        counts = _gathered(assigned_E, order.max_segments if asked else 0, token_group)
    else:
        capacity = expert_capacity(capacity_factor, order.num_tokens, top_k, num_experts)
        place = (num_experts, capacity, order, rank, token_group)
        tally = None
        if drop_policy == "probability":
            chosen_Tk = logits_TE.detach().softmax(1).gather(1, experts_Tk)
            kept_Tk, counts = _keep_by_probability(experts_Tk, chosen_Tk, *place)
        else:
            kept_Tk, counts = _keep_by_position(experts_Tk, *place)

    return Routing(
        experts_Tk,
        weights_Tk,
        kept_Tk,
        counts,
        logits_TE,
        order.num_tokens,
        aux_loss_coefficient,
        tally,
    )


def _gathered(
    assigned_E: Tensor, num_segments: int, token_group: dist.ProcessGroup | None
) -> AssignmentCounts:
    """Counts without drops; with segments in the message of ranks that drop by position."""
    num_experts = len(assigned_E)
    if not num_segments or token_group is None:
        assigned_RE = all_gather(assigned_E, token_group)
        return AssignmentCounts(assigned_RE, assigned_RE)
    message = assigned_E.new_zeros(num_segments * num_experts + 1)
    message[:num_experts] = assigned_E
    counts_RJE, training_R = _with_training(all_gather(message, token_group), num_experts)
    assigned_RE = counts_RJE.sum(1)
    return AssignmentCounts(assigned_RE, assigned_RE, training_R)


def _with_training(messages: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Messages ``[R, J E + 1]`` as ``[R, J, E]`` and ``[R]``."""
    return messages[:, :-1].unflatten(1, (-1, num_experts)), messages[:, -1]


def _keep_by_position(
    experts_Tk: Tensor,
    num_experts: int,
    capacity: int,
    order: TokenOrder,
    rank: int,
    token_group: dist.ProcessGroup | None,
) -> tuple[Tensor, AssignmentCounts]:
    """First come, first served in the global order.

    The place of an assignment in its expert's queue is the count of the expert in all earlier
    segments, of any rank, plus the count so far in its own segment.
    """
    before_ET = rows_before(experts_Tk, num_experts)
    bounds_J = order.segment_bounds(rank, experts_Tk.device)
    at_bounds_JE = before_ET[:, bounds_J].T.long()
    counts_JE, training_R = at_bounds_JE.diff(dim=0), None
    if token_group is None:
        counts_RJE = counts_JE.unsqueeze(0)
    else:
        message = torch.cat([counts_JE.flatten(), counts_JE.new_ones(1)])
        counts_RJE, training_R = _with_training(all_gather(message, token_group), num_experts)
    assigned_RE = counts_RJE.sum(1)

    by_position = order.segments_by_position(experts_Tk.device)
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
    return place_Tk < capacity, AssignmentCounts(assigned_RE, kept_RE, training_R)


def _keep_by_probability(
    experts_Tk: Tensor,
    probabilities_Tk: Tensor,
    num_experts: int,
    capacity: int,
    order: TokenOrder,
    rank: int,
    token_group: dist.ProcessGroup | None,
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
    by_position = order.tokens_by_position(experts_Tk.device)
    gathered_A2 = all_gather(mine, token_group).view(ranks * most, top_k, 2)[by_position]
    experts_A = gathered_A2[..., 0].long().flatten()
    probabilities_A = gathered_A2[..., 1].flatten()
    # (rank, expert) of every assignment as one number; sums of integers do not depend on order.
    pair_A = by_position.div(max(most, 1), rounding_mode="floor").repeat_interleave(top_k)
    pair_A = pair_A * num_experts + experts_A
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
    return kept_Tk, AssignmentCounts(assigned_RE, kept_RE)


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[...]`` of every rank as ``[ranks, ...]``."""
    if group is None:
        return x.unsqueeze(0)
    gathered = x.new_empty(group.size(), *x.shape)
    # Not to a list of tensors: NCCL would gather elsewhere and copy a rank's at a time.
    _all_gather(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered
