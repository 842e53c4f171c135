"""Losses of a router beside the global auxiliary loss, and what balance is measured by.

Where a bias or groups of experts decide the choice, an expert's load in the auxiliary losses is
that of the k best scores: what the gate prefers, since the gate is what the losses train
(DeepSeek-V3, equation 18). Otherwise it is that of the assignments before drop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.config import RouterConfig
from moe_parallel.router.counts import RouterLosses, Routing, counted
from moe_parallel.router.scores import best


class TokenSequences(NamedTuple):
    """Which tokens form a sequence, for the auxiliary loss of each.

    Attributes:
        numbers: ``[rows]`` int64 on the device, for each row that this rank passes to the layer the
            number of its sequence among those of all ranks; of padding any number.
        num: sequences of all ranks, the same on every rank.
    """

    numbers: Tensor
    num: int


def router_losses(
    routing: Routing,
    router: RouterConfig,
    sequences: TokenSequences | None,
    token_group: dist.ProcessGroup | None,
) -> RouterLosses:
    """The losses that ``router`` asks for.

    Communication: one all-reduce of E int64 over ``token_group`` where there is an auxiliary loss
    and a bias or groups decide the choice; that of :func:`sequence_loss`.
    """
    preferred = sequence = z = None
    if routing.aux_loss_coefficient or router.sequence_loss_coefficient:
        experts_Tk = preferred_experts(routing.experts, routing.logits, router)
        if routing.aux_loss_coefficient and not router.by_score:
            preferred = summed_over(token_group, counted(experts_Tk, routing.logits.shape[1]))
        if router.sequence_loss_coefficient:
            assert sequences is not None  # the layer has checked it
            loss = sequence_loss(experts_Tk, routing.probabilities, sequences, token_group)
            sequence = router.sequence_loss_coefficient * loss
    if router.z_loss_coefficient:
        z = router.z_loss_coefficient * z_loss(routing.logits, routing.num_tokens)
    return RouterLosses(preferred, sequence, z)


def preferred_experts(experts_Tk: Tensor, logits_TE: Tensor, router: RouterConfig) -> Tensor:
    """``[T, k]``: the experts that count in the auxiliary losses."""
    # Every score function rises with the logit.
    return experts_Tk if router.by_score else best(logits_TE.detach(), experts_Tk.shape[1])


def summed_over(group: dist.ProcessGroup | None, x: Tensor) -> Tensor:
    """``x``, in place, of all ranks."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def sequence_loss(
    experts_Tk: Tensor,
    probabilities_TE: Tensor,
    sequences: TokenSequences,
    token_group: dist.ProcessGroup | None,
) -> Tensor:
    """The mean over the sequences of E sum_i f_i m_i, of each sequence's own f_i and m_i.

    Args:
        experts_Tk: :func:`preferred_experts`.
        probabilities_TE: gate probabilities, which sum to 1.
        sequences: of the routed tokens.
        token_group: ranks that hold parts of the sequences.

    Returns:
        This rank's share: the sum over the group is the loss.

    Communication: one all-reduce of S x E int64 counts, S sequences.
    """
    (_, top_k), (_, num_experts) = experts_Tk.shape, probabilities_TE.shape
    sequence_A = (sequences.numbers.unsqueeze(1) * num_experts + experts_Tk).flatten()
    counts = sequence_A.new_zeros(sequences.num * num_experts)
    counts.index_add_(0, sequence_A, torch.ones_like(sequence_A))  # integers: any order
    load_SE = summed_over(token_group, counts).view(-1, num_experts).to(probabilities_TE.dtype)
    assignments_S1 = load_SE.sum(1, keepdim=True).clamp(min=1)
    # f_i / tokens, gathered by the tokens: no sum of floats over a token's sequence, whose order
    # would be left open.
    factor_SE = load_SE / assignments_S1 * (top_k / assignments_S1)
    total = (probabilities_TE * factor_SE[sequences.numbers]).sum()
    return total * (num_experts / max(sequences.num, 1))


def z_loss(logits_TE: Tensor, num_tokens: int) -> Tensor:
    """This rank's share of the mean over all tokens of log(sum exp logits)^2."""
    return logits_TE.logsumexp(1).square().sum() / max(num_tokens, 1)
