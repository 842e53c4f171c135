"""The global router: which experts each token goes to, and which assignments are dropped.

One decision for all tokens of the token group (every rank of a pipeline stage), so that it does not
depend on how the tokens are split over data, context or expert parallel ranks. What the ranks must
tell each other is gathered before any token travels, in one collective:

    dropless               counts of every expert                  E x 8 bytes a rank
    drop by position       counts of every (segment, expert)       J x E x 8 + 8 bytes a rank
    drop by probability    (expert, probability) of assignments    T x k x 16 bytes a rank

Where tokens may cross to a rank once, the first two tell its tokens for each EP rank too: EP x 8
bytes more.

Gate: logits = x gate^T; the k largest are chosen (equal logits: the lower expert first), the
weights are the softmax over the chosen logits. In float32 or wider, under autocast too, by
:func:`moe_parallel.router.top_k.choose`. Other scores, biases and groups:
:mod:`moe_parallel.router.scores`. The gate probability below is the softmax over all E logits, with
sigmoid scores a score over the sum of all E (drops compare the scores themselves).

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
coefficient = alpha / E^2 (alpha * k / E^2 if f_i counts assignments per token). Other losses:
:mod:`moe_parallel.router.losses`.

Source: MiniMax-01 sections 2.1 (equation 1, auxiliary loss, global router); GShard for the loss.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp._core.collectives import all_gather
from lasp._core.dtypes import wide_dtype
from lasp._core.impl import ChosenImpl, chosen_impl
from moe_parallel.config import DropPolicy, MoEConfig, ScoreFunction
from moe_parallel.kernels.histogram import Histogram
from moe_parallel.router.capacity import gathered_segments, keep_by_position, keep_by_probability
from moe_parallel.router.counts import AssignmentCounts, Routing, counted, tokens_of_ranks
from moe_parallel.router.losses import TokenSequences, router_losses
from moe_parallel.router.scores import RoutingReplay, Scoring
from moe_parallel.router.token_order import TokenOrder
from moe_parallel.router.top_k import choose
from moe_parallel.topology import ExpertGroups


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
    scoring: Scoring | None = None,
    num_ranks: int = 0,
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
        training: False drops nothing; equal on every rank, which ``HostTokenCounts`` checks.
        scoring: how experts are scored and chosen; None: by the largest logits.
        num_ranks: EP ranks whose tokens are counted and gathered too; 0: none.

    Returns:
        :class:`Routing`, without ``losses``; the sum of ``aux_loss`` over the group is the loss.

    Gradients: ``weights_Tk`` and ``aux_loss`` (with a coefficient of 0 a constant) to x and gate;
    counts have none. The gate's gradient is whole once summed over the token group.

    Communication: one all-gather over ``token_group``, see the top of this file; no host copy.
    """
    rank = 0 if token_group is None else dist.get_rank(token_group)
    num_experts = gate_EM.shape[0]
    kept_Tk: Tensor | None = None
    chosen = choose(x_TM, gate_EM, top_k, impl, scoring, num_ranks)
    logits_TE, experts_Tk, weights_Tk, histogram = chosen
    scores: ScoreFunction = scoring.router.score_function if scoring else "softmax_of_top_k"
    if capacity_factor is None or not training:
        mine = _own_counts(experts_Tk, num_experts, num_ranks, histogram)
        asked = capacity_factor is not None and drop_policy == "position"
        counts = counts_of_ranks(mine, num_experts, order.max_segments * asked, token_group)
    else:
        histogram = None
        most = expert_capacity(capacity_factor, order.num_tokens, top_k, num_experts)
        capped = (num_experts, most, order, rank, token_group, num_ranks)
        if drop_policy == "position":
            kept_Tk, counts = keep_by_position(experts_Tk, *capped)
        else:
            scores_Tk = _compared(logits_TE.detach(), experts_Tk, scores)
            kept_Tk, counts = keep_by_probability(experts_Tk, scores_Tk, *capped)
    decision = (experts_Tk, weights_Tk, kept_Tk, counts, logits_TE)
    return Routing(*decision, order.num_tokens, aux_loss_coefficient, histogram, scores)


def _own_counts(
    experts_Tk: Tensor, num_experts: int, num_ranks: int, histogram: Histogram | None
) -> Tensor:
    """Assignments of each expert by this rank's tokens, then its tokens for each EP rank."""
    if histogram is not None:
        return histogram.totals
    tokens_P = tokens_of_ranks(experts_Tk, num_experts, num_ranks).sum(0)
    return torch.cat([counted(experts_Tk, num_experts), tokens_P])


def counts_of_ranks(
    counts: Tensor, num_experts: int, num_segments: int, token_group: dist.ProcessGroup | None
) -> AssignmentCounts:
    """Counts without drops; with segments in the message of ranks that drop by position.

    Args:
        counts: ``[E + P]`` int64, of this rank: assignments, and tokens of each EP rank.
        num_experts: E.
        num_segments: of a rank that drops by position; 0: none does.
        token_group: whose counts are gathered.
    """
    if not num_segments or token_group is None:
        gathered = counts.unsqueeze(0) if token_group is None else all_gather(counts, token_group)
        if gathered.shape[1] == num_experts:
            return AssignmentCounts(gathered, gathered)
        assigned_RE = gathered[:, :num_experts]
        tokens_RP = gathered[:, num_experts:]
        return AssignmentCounts(assigned_RE, assigned_RE, None, tokens_RP, gathered)
    counts_JE = counts.new_zeros(num_segments, num_experts)
    counts_JE[0] = counts[:num_experts]
    message = (counts_JE, counts[num_experts:], 0)
    counts_RJE, of_ranks, training_R = gathered_segments(*message, token_group)
    assigned_RE = counts_RJE.sum(1)
    return AssignmentCounts(assigned_RE, assigned_RE, training_R, of_ranks)


def _compared(logits_TE: Tensor, experts_Tk: Tensor, score_function: ScoreFunction) -> Tensor:
    """``[T, k]``: by what the assignments to a full expert are compared."""
    scores_TE = logits_TE.sigmoid() if score_function == "sigmoid" else logits_TE.softmax(1)
    return scores_TE.gather(1, experts_Tk)


class Router(nn.Module):
    """The gate of an expert layer and its one decision over all ranks.

    A module of its own, called once a call of the layer: wrappers that gather parameters in hooks
    (FSDP, Megatron's ``overlap_param_gather``) gather the gate here.

    Parameters: ``weight`` ``[E, hidden]``, the same on every rank, in :func:`wide_dtype` of
    ``dtype``. It has no values until :meth:`reset_parameters` or a checkpoint fills it. Buffer, if
    the config has ``expert_bias``: ``expert_bias`` ``[E]``, float32 whatever the module is cast to.

    Args:
        config: of the layer.
        token_group: ranks that share the decision; None for this rank alone.
        num_ranks: EP ranks whose tokens are counted; 0: none.
        device: of the weight.
        dtype: of the tokens.

    Attributes:
        local_tokens_per_expert: with a bias ``[E]`` int64, this rank's assignments before drop in
            the backwards since the last update. No buffer: DDP would broadcast it.
    """

    expert_bias: Tensor | None

    keeps_dtype = True  # whatever others are cast to, see moe_parallel.apply_fsdp

    def __init__(
        self,
        config: MoEConfig,
        token_group: dist.ProcessGroup | None = None,
        num_ranks: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.groups = config, ExpertGroups(token=token_group)
        self._num_ranks = num_ranks
        dtype = wide_dtype(dtype or torch.get_default_dtype())
        shape = (config.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_buffer("expert_bias", None)
        if config.router.expert_bias:
            self.expert_bias = self.weight.new_zeros(shape[0], dtype=torch.float32)
            self.local_tokens_per_expert = self.weight.new_zeros(shape[0], dtype=torch.int64)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """As of any module, but the bias stays float32, and the counts follow it."""
        bias, self.expert_bias = self.expert_bias, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None:
            kept = (bias, self.local_tokens_per_expert)
            self.expert_bias, self.local_tokens_per_expert = (
                torch.zeros_like(x, device=self.weight.device)
                if x.is_meta
                else x.to(self.weight.device)
                for x in kept
            )
        return self

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Fill with Xavier normal values of a CPU generator; leave a weight on meta alone."""
        if self.weight.is_meta:
            return
        std = math.sqrt(2 / (self.config.hidden_size + self.config.num_experts))
        gate = torch.empty(self.weight.shape, device="cpu", dtype=torch.float32)
        self.weight.copy_(gate.normal_(0, std, generator=generator))
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(
        self,
        x_TM: Tensor,
        order: TokenOrder,
        *,
        replay: RoutingReplay | None = None,
        sequences: TokenSequences | None = None,
    ) -> Routing:
        """Where this rank's tokens go, see :func:`moe_parallel.router.route.route`.

        Args:
            x_TM: routed tokens of this rank, by global position.
            order: where the tokens of every rank stand; equal on every rank.
            replay: the choice to make again, or to keep.
            sequences: of the routed tokens; with a ``sequence_loss_coefficient`` alone.

        Gradients: of :func:`moe_parallel.router.route.route`.

        Communication: of :func:`moe_parallel.router.route.route` and
        :func:`moe_parallel.router.losses.router_losses`.
        """
        config, router = self.config, self.config.router
        scoring, experts = None, None if replay is None else replay.experts
        if experts is not None or not router.by_logits:
            scoring = Scoring(router, self.expert_bias, experts)
        routing = route(
            x_TM,
            self.weight,
            top_k=config.top_k,
            order=order,
            token_group=self.groups.token,
            capacity_factor=None if config.pad_to_capacity else config.capacity_factor,
            drop_policy=config.drop_policy,
            aux_loss_coefficient=config.aux_loss_coefficient,
            impl=chosen_impl(config.impl, x_TM.device, x_TM.dtype),
            training=self.training,
            scoring=scoring,
            num_ranks=self._num_ranks,
        )
        if replay is not None:
            replay.experts = routing.experts
        if router.has_losses or (config.aux_loss_coefficient and not router.by_score):
            losses = router_losses(routing, router, sequences, self.groups.token)
            routing = routing._replace(losses=losses)
        if self.expert_bias is not None and self.training and routing.weights.requires_grad:
            # In the backward: a layer that is recomputed runs forward twice, backward once.
            rank = 0 if self.groups.token is None else dist.get_rank(self.groups.token)
            assigned_E = routing.counts.assigned[rank]
            routing.weights.register_hook(partial(_count, self.local_tokens_per_expert, assigned_E))
        return routing


@torch.no_grad()
def _count(total_E: Tensor, assigned_E: Tensor, _: Tensor) -> None:
    total_E += assigned_E
