"""Choice and weights of routers with scores, biases or groups of experts; here in plain torch.

    scores    softmax over all E logits, or sigmoid of each; ``softmax_of_top_k``: the logits
    choice    the k largest of scores + bias, among the experts of the token's best groups
    weights   the chosen scores, divided by their sum or not

Normalised weights are the softmax over the logarithms of the chosen scores: no sum underflows.
Equal scores: the lower expert first. NaN is larger than all, as in
:mod:`moe_parallel.router.top_k`.

Example, sigmoid, k = 2, num_groups = 2, top_groups = 1::

    scores     0.9 0.1 | 0.6 0.5       sums of the groups' two best: 1.0, 1.1
    choice     experts 2, 3            weights 0.6 / 1.1, 0.5 / 1.1

Source: DeepSeek-V3 (arXiv:2412.19437), equations 13 to 16; DeepSeek-V2 for groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp._core.checks import check_part
from moe_parallel.config import RouterConfig


@dataclass
class RoutingReplay:
    """The choice of one layer for one batch, to be made again: by a trainer after a sampler, say.

    Attributes:
        experts: ``[T, k]`` int64, for each routed token of this rank, by global position, the
            experts that it chooses, each at most once. None: the next call chooses, and keeps its
            choice here. Weights are those of the gate of each call. An expert out of range ends
            the rank that has it before its first collective, on the host with a ValueError, on a
            GPU with an assertion of the device; other ranks end by the timeout of their group.
    """

    experts: Tensor | None = None

    def __post_init__(self) -> None:
        check_part("experts", self.experts, Tensor, optional=True)


class Scoring(NamedTuple):
    """How a router scores and chooses.

    Attributes:
        router: its config.
        expert_bias: ``[E]``, added to the scores for the choice alone; None: no bias.
        experts: ``[T, k]`` int64, choices to take in the place of the router's; None: it chooses.
    """

    router: RouterConfig
    expert_bias: Tensor | None = None
    experts: Tensor | None = None


def choose_by_scores(logits_TE: Tensor, top_k: int, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Experts ``[T, k]`` int64, best first, and their weights ``[T, k]``.

    Gradients: of the weights to the logits.

    Raises:
        ValueError: for given experts out of range, on a CPU; a GPU's assertion ends the process.
    """
    router, experts_Tk = scoring.router, scoring.experts
    if experts_Tk is None:
        scores_TE = scores_of(logits_TE.detach(), router)
        if scoring.expert_bias is not None:
            scores_TE = scores_TE + scoring.expert_bias
        if router.num_groups is not None and router.top_groups is not None:
            scores_TE = in_best_groups(scores_TE, top_k, router.num_groups, router.top_groups)
        experts_Tk = best(scores_TE, top_k)
    sigmoid = router.score_function == "sigmoid"
    try:
        chosen_Tk = logits_TE.gather(1, experts_Tk)
    except RuntimeError as error:
        if scoring.experts is None or logits_TE.is_cuda:  # what a GPU did is not known here
            raise
        low, high = (int(x) for x in experts_Tk.aminmax())
        raise ValueError(
            f"replay.experts must be in [0, {logits_TE.shape[1]}), got {low} to {high}: choices of"
            " padding have no rows"
        ) from error
    if router.normalize:
        weights_Tk = (F.logsigmoid(chosen_Tk) if sigmoid else chosen_Tk).softmax(1)
    elif sigmoid:
        weights_Tk = chosen_Tk.sigmoid()
    else:
        weights_Tk = logits_TE.softmax(1).gather(1, experts_Tk)
    return experts_Tk, weights_Tk * router.scaling


def scores_of(logits_TE: Tensor, router: RouterConfig) -> Tensor:
    """``[T, E]``: by which experts are compared."""
    if router.score_function == "sigmoid":
        return logits_TE.sigmoid()
    return logits_TE.softmax(1) if router.score_function == "softmax" else logits_TE


def best(scores_TE: Tensor, top_k: int) -> Tensor:
    """``[T, k]``: the experts with the largest scores; of equal ones the lower first."""
    # topk leaves the order of equal values open; a stable sort does not.
    return scores_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()


def in_best_groups(scores_TE: Tensor, top_k: int, num_groups: int, top_groups: int) -> Tensor:
    """The scores, -inf outside of a token's best groups."""
    scores_TGE = scores_TE.view(len(scores_TE), num_groups, scores_TE.shape[1] // num_groups)
    sums_TG = scores_TGE.topk(top_k // top_groups, dim=2).values.sum(2)
    outside_TG = torch.ones_like(sums_TG, dtype=torch.bool)
    outside_TG.scatter_(1, best(sums_TG, top_groups), value=False)
    return scores_TGE.masked_fill(outside_TG.unsqueeze(2), -torch.inf).view_as(scores_TE)
