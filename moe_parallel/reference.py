"""Oracle: the expert layer over the whole batch, token by token, in any float dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp._core.dtypes import wide_dtype
from moe_parallel.config import DropPolicy, RouterConfig
from moe_parallel.router.route import expert_capacity


class ReferenceOutput(NamedTuple):
    """Result of :func:`reference_moe`.

    Attributes:
        output: ``[N, hidden]``, the layer's output.
        aux_loss: the whole auxiliary loss.
        kept: the kept assignments as (token, expert).
    """

    output: Tensor
    aux_loss: Tensor
    kept: frozenset[tuple[int, int]]


def reference_moe(
    x_NM: Tensor,
    gate_EM: Tensor,
    w13_E2FM: Tensor,
    w2_EMF: Tensor,
    *,
    top_k: int,
    capacity_factor: float | None = None,
    drop_policy: DropPolicy = "position",
    aux_loss_coefficient: float = 0.0,
    router: RouterConfig = RouterConfig(),  # noqa: B008 (immutable)
    expert_bias: Sequence[float] | None = None,
    replayed: Sequence[Sequence[int]] | None = None,
    sequences: Sequence[int] | None = None,
    shared: Sequence[Tensor] = (),
) -> ReferenceOutput:
    """h_n = sum over the kept of n's top k experts of softmax(top-k logits) FFN_e(x_n).

    FFN_e(x) = w2_e (silu(w1_e x) * w3_e x), (w1_e, w3_e) = w13_e. Capacity, drop policies and the
    auxiliary loss as in :func:`moe_parallel.router.route.route`; other scores, choices and losses
    by ``router`` (:class:`moe_parallel.RouterConfig`). All N tokens in global order on one device;
    gradients by autograd. Nothing here is fast.

    Args:
        x_NM: tokens.
        gate_EM: gate weight.
        w13_E2FM: first product, gate and up.
        w2_EMF: second product.
        top_k: k.
        capacity_factor: None is dropless.
        drop_policy: who is dropped.
        aux_loss_coefficient: of the loss over all tokens.
        router: how experts are scored and chosen.
        expert_bias: E numbers; None: zeros.
        replayed: the experts of each token; None: the router chooses.
        sequences: the sequence of each token, from 0; None: all tokens are one.
        shared: ``w13`` ``[2, F, M]`` and ``w2`` ``[M, F]`` of the shared expert, and its gate
            ``[1, M]`` if it has one.
    """
    num_experts, dtype = gate_EM.shape[0], wide_dtype(x_NM.dtype)
    logits_NE = x_NM.to(dtype) @ gate_EM.to(dtype).T
    scores_NE = logits_NE.sigmoid() if router.score_function == "sigmoid" else logits_NE.softmax(1)
    by_logits = router.score_function == "softmax_of_top_k"
    compared_NE = (logits_NE if by_logits else scores_NE).tolist()
    preferred = [_largest(row_E, range(num_experts), top_k) for row_E in compared_NE]
    bias = expert_bias or [0.0] * num_experts
    chosen = replayed or [_chosen(row_E, top_k, router, bias) for row_E in compared_NE]
    counted = chosen if expert_bias is None and router.num_groups is None else preferred
    kept = _kept(chosen, scores_NE, top_k, capacity_factor, drop_policy)
    rows = [_ffn(x_M, *shared) if shared else torch.zeros_like(x_M) for x_M in x_NM]
    for token, experts in enumerate(chosen):
        weights = _weights(logits_NE[token, experts], scores_NE[token, experts], router)
        for weight, expert in zip(weights.to(x_NM.dtype), experts):
            if (token, expert) in kept:
                y_M = _ffn(x_NM[token], w13_E2FM[expert], w2_EMF[expert])
                rows[token] = rows[token] + weight * y_M
    output_NM = torch.stack(rows) if rows else x_NM * 1
    aux_loss = _losses(logits_NE, scores_NE, counted, router, aux_loss_coefficient, sequences)
    return ReferenceOutput(output_NM, aux_loss, kept)


def _ffn(x_M: Tensor, w13: Tensor, w2: Tensor, gate: Tensor | None = None) -> Tensor:
    """What an expert makes of a token; the shared expert may have a gate."""
    first, up = w13 @ x_M
    y_M: Tensor = w2 @ (F.silu(first) * up)
    return y_M if gate is None else y_M * (gate @ x_M).sigmoid()


def _weights(logits_k: Tensor, scores_k: Tensor, router: RouterConfig) -> Tensor:
    """The weights of a token's experts."""
    if router.score_function == "softmax_of_top_k":
        scores_k = logits_k.softmax(0)
    elif router.normalize:
        scores_k = scores_k / scores_k.sum()
    return scores_k * router.scaling


def _kept(
    chosen: Sequence[Sequence[int]],
    scores_NE: Tensor,
    top_k: int,
    capacity_factor: float | None,
    drop_policy: DropPolicy,
) -> frozenset[tuple[int, int]]:
    """The assignments that no full expert drops, as (token, expert)."""
    (tokens, num_experts), capacity = scores_NE.shape, None
    if capacity_factor is not None:
        capacity = expert_capacity(capacity_factor, tokens, top_k, num_experts)
    queues: list[list[int]] = [[] for _ in range(num_experts)]
    for token, experts in enumerate(chosen):
        for expert in experts:
            queues[expert].append(token)
    if drop_policy == "probability":
        for queue, column in zip(queues, scores_NE.T.tolist()):
            queue.sort(key=lambda token: -column[token])
    return frozenset(
        (token, expert) for expert, queue in enumerate(queues) for token in queue[:capacity]
    )


def _losses(
    logits_NE: Tensor,
    scores_NE: Tensor,
    counted: Sequence[Sequence[int]],
    router: RouterConfig,
    aux_loss_coefficient: float,
    sequences: Sequence[int] | None,
) -> Tensor:
    """All losses of the router: over all tokens, of each sequence, and of the logits' size."""
    tokens, sigmoid = len(logits_NE), router.score_function == "sigmoid"
    probabilities_NE = scores_NE / scores_NE.sum(1, keepdim=True) if sigmoid else scores_NE
    aux_loss = aux_loss_coefficient * _balance(counted, probabilities_NE, range(tokens))
    if router.sequence_loss_coefficient:
        numbers = [0] * tokens if sequences is None else sequences
        for number in set(numbers):
            members = [token for token in range(tokens) if numbers[token] == number]
            loss = _balance(counted, probabilities_NE, members) / len(set(numbers))
            aux_loss = aux_loss + router.sequence_loss_coefficient * loss
    z_loss = logits_NE.exp().sum(1).log().square().sum() / max(tokens, 1)
    return aux_loss + router.z_loss_coefficient * z_loss


def _largest(values: Sequence[float], among: Iterable[int], count: int) -> list[int]:
    """The indices with the largest values; of equal ones the lower first."""
    return sorted(among, key=lambda index: (-values[index], index))[:count]


def _chosen(
    scores: Sequence[float], top_k: int, router: RouterConfig, bias: Sequence[float]
) -> list[int]:
    """The experts of a token."""
    biased = [score + added for score, added in zip(scores, bias)]
    if router.num_groups is None or router.top_groups is None:
        return _largest(biased, range(len(biased)), top_k)
    size, best = len(biased) // router.num_groups, top_k // router.top_groups
    groups = [range(first, first + size) for first in range(0, len(biased), size)]
    sums = [sum(sorted((biased[e] for e in group), reverse=True)[:best]) for group in groups]
    top = _largest(sums, range(len(groups)), router.top_groups)
    return _largest(biased, [expert for group in top for expert in groups[group]], top_k)


def _balance(
    chosen: Sequence[Sequence[int]], probabilities_NE: Tensor, members: Sequence[int]
) -> Tensor:
    """E sum_i f_i m_i over some tokens."""
    num_experts = probabilities_NE.shape[1]
    assigned = [0] * num_experts
    for token in members:
        for expert in chosen[token]:
            assigned[expert] += 1
    fraction_E = probabilities_NE.new_tensor(assigned) / max(sum(assigned), 1)
    mean_E = probabilities_NE[list(members)].sum(0) / max(len(members), 1)
    return num_experts * (fraction_E * mean_E).sum()
