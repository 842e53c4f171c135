"""The global router: which experts each token goes to, and which assignments are dropped.

One decision for all tokens of the token group (every rank of a pipeline stage), so that it does not
depend on how the tokens are split over data, context or expert parallel ranks. What the ranks must
tell each other is gathered before any token travels, in one collective:

    dropless               counts of every expert                  E x 8 bytes a rank
    drop by position       counts of every (segment, expert)       J x E x 8 + 8 bytes a rank
    drop by probability    (expert, probability) of assignments    T x k x 16 bytes a rank

Gate: logits = x gate^T; the k largest are chosen (equal logits: the lower expert first), the
weights are the softmax over the chosen logits. In float32 or wider, under autocast too, by
:func:`moe_parallel.router.top_k.choose`.

Capacity: an expert keeps at most C = ceil(capacity_factor * N * k / E) assignments of the N tokens
of all ranks. ``position`` keeps those that come first in the global order (an expert is chosen at
most once a token, so slots never compete); ``probability`` keeps those with the highest gate
probability (softmax over all E logits), equal ones by position. A dropped assignment is not
dispatched and adds nothing to the output. The split of the tokens over ranks changes only the last
bits of the logits, as any change of a matrix product's shape does: only a tie to rounding can fall
another way.

Auxiliary loss, global: coefficient * E * sum_i f_i m_i, with f_i expert i's part of the N k
assignments before drop, and m_i the mean of its gate probability over the N tokens. It is
coefficient at perfect balance. MiniMax writes alpha * (1/E) * sum_i f_i m_i: for that, set
coefficient = alpha / E^2 (alpha * k / E^2 if f_i counts assignments per token).

Source: MiniMax-01 sections 2.1 (equation 1, auxiliary loss, global router); GShard for the loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp._core.dtypes import wide_dtype
from lasp._core.impl import ChosenImpl, chosen_impl
from moe_parallel.config import DropPolicy, MoEConfig
from moe_parallel.kernels.histogram import Histogram
from moe_parallel.router.capacity import keep_by_position, keep_by_probability
from moe_parallel.router.counts import AssignmentCounts, counted, counts_of_ranks
from moe_parallel.router.token_order import TokenOrder
from moe_parallel.router.top_k import choose
from moe_parallel.topology import ExpertGroups


class RoutingStats(NamedTuple):
    """Expert balance over the whole token group; the same on every rank, on the device.

    Attributes:
        assigned: ``[E]``, assignments of each expert before drop, int64.
        dropped: ``[E]``, of these, how many exceeded the capacity, int64.
    """

    assigned: Tensor
    dropped: Tensor


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
        histogram: this rank's assignments as kernels have counted them; None by plain torch, and
            with drops, where it counts too many.
    """

    experts: Tensor
    weights: Tensor
    mask: Tensor | None
    counts: AssignmentCounts
    logits: Tensor
    num_tokens: int
    aux_loss_coefficient: float
    histogram: Histogram | None = None

    @property
    def dropless(self) -> bool:
        """No assignment can be dropped: known on the host, as their numbers then are."""
        return self.mask is None

    # These three are computed at every access: no token waits for them. Read each once.
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


def route(
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
    """Route this rank's tokens under a decision shared by all ranks; the rules are above.

    Args:
        x_TM: routed tokens of this rank, by global position; any float dtype.
        gate_EM: gate weight, the same on every rank.
        top_k: k, experts a token.
        order: where every rank's tokens stand; equal on every rank.
        token_group: ranks that share the decision; None for this rank alone.
        capacity_factor: None is dropless.
        drop_policy: who is dropped when an expert is full.
        aux_loss_coefficient: 0.01 in MiniMax-01's pre-training.
        impl: computes the choice and its counts; what is gathered does not depend on it.
        training: False drops nothing; must be equal on every rank. By position the message tells
            it, and :class:`moe_parallel.router.counts.HostTokenCounts` checks it.

    Returns:
        :class:`Routing`. ``aux_loss`` is a share: its sum over the token group is the loss.

    Gradients: ``weights_Tk`` and ``aux_loss`` (with a coefficient of 0 a constant) to x and gate;
    counts have none. The gate's gradient is whole once summed over the token group.

    Communication: one all-gather over ``token_group``, see the top of this file; no host copy.
    """
    rank = 0 if token_group is None else dist.get_rank(token_group)
    num_experts, kept_Tk = gate_EM.shape[0], None
    logits_TE, experts_Tk, weights_Tk, histogram = choose(x_TM, gate_EM, top_k, impl)
    if capacity_factor is None or not training:
        assigned_E = counted(experts_Tk, num_experts) if histogram is None else histogram.totals
        asked = capacity_factor is not None and drop_policy == "position"
        counts = counts_of_ranks(assigned_E, order.max_segments if asked else 0, token_group)
    else:
        histogram = None
        capacity = expert_capacity(capacity_factor, order.num_tokens, top_k, num_experts)
        how = (num_experts, capacity, order, rank, token_group)
        if drop_policy == "position":
            kept_Tk, counts = keep_by_position(experts_Tk, *how)
        else:
            chosen_Tk = logits_TE.detach().softmax(1).gather(1, experts_Tk)
            kept_Tk, counts = keep_by_probability(experts_Tk, chosen_Tk, *how)
    decision = (experts_Tk, weights_Tk, kept_Tk, counts, logits_TE)
    return Routing(*decision, order.num_tokens, aux_loss_coefficient, histogram)


class Router(nn.Module):
    """The gate of an expert layer and its one decision over all ranks.

    A module of its own, called once a call of the layer: wrappers that gather parameters in hooks
    (FSDP, Megatron's ``overlap_param_gather``) gather the gate here.

    Parameters: ``weight`` ``[E, hidden]``, the same on every rank, in :func:`wide_dtype` of
    ``dtype``. It has no values until :meth:`reset_parameters` or a checkpoint fills it.

    Args:
        config: of the layer.
        token_group: ranks that share the decision; None for this rank alone.
        device: of the weight.
        dtype: of the tokens.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        token_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.groups = config, ExpertGroups(token=token_group)
        dtype = wide_dtype(dtype or torch.get_default_dtype())
        shape = (config.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Fill with Xavier normal values of a CPU generator; leave a weight on meta alone."""
        if self.weight.is_meta:
            return
        std = math.sqrt(2 / (self.config.hidden_size + self.config.num_experts))
        gate = torch.empty(self.weight.shape, device="cpu", dtype=torch.float32)
        self.weight.copy_(gate.normal_(0, std, generator=generator))

    def forward(self, x_TM: Tensor, order: TokenOrder) -> Routing:
        """Where this rank's tokens go, see :func:`moe_parallel.router.route.route`.

        Args:
            x_TM: routed tokens of this rank, by global position.
            order: where the tokens of every rank stand; equal on every rank.

        Gradients, Communication: of :func:`moe_parallel.router.route.route`.
        """
        return route(
            x_TM,
            self.weight,
            top_k=self.config.top_k,
            order=order,
            token_group=self.groups.token,
            capacity_factor=None if self.config.pad_to_capacity else self.config.capacity_factor,
            drop_policy=self.config.drop_policy,
            aux_loss_coefficient=self.config.aux_loss_coefficient,
            impl=chosen_impl(self.config.impl, x_TM.device, x_TM.dtype),
            training=self.training,
        )
