"""Megatron's router: options as :class:`moe_parallel.RouterConfig`, sequences, padding masks."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp._core.collectives import all_gather
from moe_parallel.config import RouterConfig
from moe_parallel.router.losses import TokenSequences
from moe_parallel.router.token_order import TokenOrder, TokenSegment

_SEQUENCE_LOSSES = ("aux_loss", "seq_aux_loss")  # of each data parallel rank, or of each row
_LOSSES = (*_SEQUENCE_LOSSES, "global_aux_loss")


def router_config(config: TransformerConfig) -> RouterConfig:
    """How experts are chosen and weighted.

    Raises:
        ValueError: for what our router does not have, naming the option.
    """
    function, top_k = config.moe_router_score_function, config.moe_router_topk
    if function not in ("softmax", "sigmoid"):
        raise ValueError(
            "config.moe_router_score_function must be 'softmax' or 'sigmoid' for the"
            f" expert-parallel MoE layer, got {function!r}: set one, or use Megatron's own MoELayer"
        )
    losses = aux_losses(config)
    after = function == "softmax" and not config.moe_router_pre_softmax
    return RouterConfig(
        score_function="softmax_of_top_k" if after else function,
        # Megatron normalises sigmoid scores of several experts, and no softmax over all.
        normalize=after or (function == "sigmoid" and top_k > 1),
        scaling=config.moe_router_topk_scaling_factor or 1.0,
        expert_bias=config.moe_router_enable_expert_bias,
        # Groups of which all are taken, or none, are none.
        num_groups=config.moe_router_num_groups if config.moe_router_group_topk else None,
        top_groups=config.moe_router_group_topk or None,
        sequence_loss_coefficient=sum(losses.get(kind, 0.0) for kind in _SEQUENCE_LOSSES),
        z_loss_coefficient=config.moe_z_loss_coeff or 0.0,
    )


def aux_losses(config: TransformerConfig) -> dict[str, float]:
    """Coefficients above 0, by Megatron's names of the auxiliary losses.

    Raises:
        ValueError: for other balancers, and for both losses of a part of the tokens at once.
    """
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds = [kinds]
        coefficients = [0.0 if kinds == ["none"] else coefficients]
    known = set(kinds) <= {*_LOSSES, "none"} and isinstance(coefficients, list)
    if (
        known
        and len(kinds) == len(coefficients)
        and not any(isinstance(c, list) for c in coefficients)
    ):
        losses = {kind: float(c) for kind, c in zip(kinds, coefficients) if c and kind != "none"}
        if not set(_SEQUENCE_LOSSES) <= set(losses):
            return losses
    raise ValueError(
        f"config.moe_router_load_balancing_type must be 'none' or among {_LOSSES}, with one"
        f" coefficient each and no more than one of {_SEQUENCE_LOSSES}, got {kinds} with"
        f" moe_aux_loss_coeff {coefficients}: change them, or use Megatron's own MoELayer"
    )


def sequences_of(
    hidden: Tensor, config: TransformerConfig, groups: ProcessGroupCollection, order: TokenOrder
) -> TokenSequences:
    """What Megatron balances by itself: each row of the batch, or the batch of a dp rank.

    Args:
        hidden: ``[T / tp, B, hidden]``.
        config: Megatron's, with one of these two losses.
        groups: tp, cp and tp_dp_cp, tp fastest, dp slowest.
        order: which rows are tokens.
    """
    size = groups.tp.size() * groups.cp.size()
    replicas, replica = groups.tp_dp_cp.size() // size, groups.tp_dp_cp.rank() // size
    length, batch = hidden.shape[:2]
    count = 1 if "aux_loss" in aux_losses(config) else batch
    numbers = torch.arange(replica * count, (replica + 1) * count, device=hidden.device)
    numbers = numbers.repeat(length * batch // count)
    return TokenSequences(order.take(numbers, groups.tp_dp_cp.rank()), replicas * count)


def order_of_mask(padding_mask: Tensor, groups: ProcessGroupCollection) -> TokenOrder:
    """Where the tokens that are no padding stand, remembered by the mask for the next layers.

    Args:
        padding_mask: ``[B, T / tp]``, True for padding.
        groups: tp_dp_cp, all of whose ranks have a mask of this size.

    Communication: once for a mask, an all-gather of a byte a token and a copy to the host.
    """
    known = getattr(padding_mask, "_token_order", None)
    if known is not None and known[0] == padding_mask._version:
        order: TokenOrder = known[1]
        return order
    tokens = padding_mask.transpose(0, 1).flatten().logical_not().to(torch.uint8)
    group = groups.tp_dp_cp if groups.tp_dp_cp.size() > 1 else None
    of_ranks = all_gather(tokens, group).view(-1, len(tokens)).cpu()
    rows = of_ranks.shape[1]
    segments = []
    for rank, is_token in enumerate(of_ranks.to(torch.int8)):
        edges = torch.nn.functional.pad(is_token, (1, 1)).diff().nonzero().view(-1, 2).tolist()
        segments.append(
            tuple(TokenSegment(rank * rows + first, first, end - first) for first, end in edges)
        )
    order = TokenOrder(tuple(segments), (rows,) * len(segments))
    padding_mask._token_order = (padding_mask._version, order)  # type: ignore[attr-defined]
    return order
