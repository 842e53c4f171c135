"""The router as a module: the gate's weight, and the decision that is made with it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_parallel.config import MoEConfig
from moe_parallel.impl import chosen_impl
from moe_parallel.router.gate import gate_dtype
from moe_parallel.router.route import Routing, route
from moe_parallel.router.token_order import TokenOrder
from moe_parallel.topology import ExpertGroups


class Router(nn.Module):
    """The gate of an expert layer and its one decision over all ranks.

    A module of its own, called once a call of the layer: wrappers that gather parameters in hooks
    (FSDP, Megatron's ``overlap_param_gather``) gather the gate here.

    Parameters: ``weight`` ``[E, hidden]``, the same on every rank, in :func:`gate_dtype` of
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
        dtype = gate_dtype(dtype or torch.get_default_dtype())
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
