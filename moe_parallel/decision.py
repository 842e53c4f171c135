"""The first step of the layer: which tokens go where, over all ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.agreement import check_counts, check_order
from moe_parallel.config import MoEConfig
from moe_parallel.order import TokenOrder
from moe_parallel.route import Routing, route
from moe_parallel.topology import ExpertMesh


class Decision(NamedTuple):
    """Result of :func:`decide`.

    Attributes:
        order: where the tokens of every rank stand.
        tokens: ``[T, hidden]``, this rank's routed tokens, by global position.
        routing: where they go.
    """

    order: TokenOrder
    tokens: Tensor
    routing: Routing


def decide(
    rows: Tensor,
    gate_EM: Tensor,
    token_order: TokenOrder | None,
    *,
    config: MoEConfig,
    mesh: ExpertMesh,
    token_group: dist.ProcessGroup | None,
    training: bool,
) -> Decision:
    """Route this rank's tokens, in an order that the ranks have compared.

    Args:
        rows: ``[tokens, hidden]``, padding included.
        gate_EM: gate weight.
        token_order: see :meth:`moe_parallel.ExpertParallelMoE.forward`.
        config: of the layer.
        mesh: likewise.
        token_group: likewise.
        training: whether there is a capacity.

    Communication: that of :func:`moe_parallel.route.route`, and of comparing orders.

    Raises:
        ValueError: for orders that differ or are missing where they must not, on every rank alike.
    """
    padded = config.pad_to_capacity and training
    capacity_factor = config.capacity_factor if training and not padded else None
    by_probability = capacity_factor is not None and config.drop_policy == "probability"
    given = token_order is not None
    if padded and not given and mesh.num_token_ranks > 1:
        raise ValueError(
            "token_order must be given with pad_to_capacity on several ranks, got None: without"
            " it the ranks compare their numbers of tokens on the host; keep one for all calls"
        )
    if token_order is None:
        token_order = TokenOrder.contiguous([rows.shape[0]] * mesh.num_token_ranks)
    # Otherwise what the router gathers is 1 x E counts, whatever a rank believes of the others.
    if given or by_probability:
        check_order(token_order, rows.shape[0], token_group, rows.device)
    x_TM = token_order.take(rows, mesh.token_rank)
    routing = route(
        x_TM,
        gate_EM,
        top_k=config.top_k,
        order=token_order,
        token_group=token_group,
        capacity_factor=capacity_factor,
        drop_policy=config.drop_policy,
        aux_loss_coefficient=config.aux_loss_coefficient,
    )
    return Decision(token_order, x_TM, routing)


def kept_on_host(routing: Routing, order: TokenOrder) -> list[list[int]]:
    """How many assignments each rank keeps for each expert.

    The one device-to-host copy: collectives and buffers after it need sizes on the host.

    Raises:
        ValueError: if the ranks assigned other numbers of tokens than the order has.
    """
    assigned_RE, kept_RE = torch.stack(routing.counts).tolist()
    check_counts(assigned_RE, routing.experts.shape[1], order)
    kept: list[list[int]] = kept_RE
    return kept
