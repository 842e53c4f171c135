"""The router's losses in Megatron's gradients and in its log."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lasp.megatron.experts.router import aux_losses
from lasp.megatron.version import record_moe_loss
from moe_parallel.router.counts import Routing

# Megatron's names.
_LOGGED = {
    "aux_loss": "load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "z_loss": "z_loss",
}


class StepBalance(nn.Module):
    """The auxiliary loss over the micro-batches of a step: Megatron's ``global_aux_loss``.

    In micro-batch m the part f_i of expert i is that in all assignments of micro-batches 1 to m of
    the step, over all ranks; the mean probability m_i is this micro-batch's. Megatron's router
    means the same for micro-batches of one size. Where sizes differ it averages counts and divides
    by the tokens of the last micro-batch, so that its f_i do not sum to 1.

    Counts are int64, which no cast of the model rounds, and are no part of a checkpoint: none is
    written within a step.
    """

    assigned: Tensor

    def __init__(self, num_experts: int, device: torch.device) -> None:
        super().__init__()
        zeros = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("assigned", zeros, persistent=False)
        self.num_tokens = 0

    def forward(self, routing: Routing) -> Tensor:
        """Count a micro-batch, and return this rank's share of its loss."""
        self.assigned += routing.load
        self.num_tokens += routing.num_tokens
        return routing.balance_loss(self.assigned, self.num_tokens)

    def reset_global_aux_loss_tracker(self) -> None:
        """Megatron's hook: ``finalize_model_grads`` calls it at the end of a step."""
        self.assigned.zero_()
        self.num_tokens = 0


class LayerLosses(NamedTuple):
    """Whose losses they are, for Megatron's log.

    Attributes:
        config: Megatron's.
        groups: tp, cp and tp_dp_cp.
        layer_number: from 1.
    """

    config: TransformerConfig
    groups: ProcessGroupCollection
    layer_number: int | None


def attach_losses(routing: Routing, balance: Tensor | None, layer: LayerLosses) -> Tensor:
    """The weights, with whose gradients those of the router's losses come.

    Args:
        routing: the decision of a micro-batch.
        balance: this rank's share of the global auxiliary loss; None: there is none.
        layer: whose losses these are.
    """
    config, coefficients = layer.config, aux_losses(layer.config)
    per_sequence = "seq_aux_loss" if "seq_aux_loss" in coefficients else "aux_loss"
    shares = {
        "global_aux_loss": balance,
        per_sequence: routing.losses.sequence,
        "z_loss": routing.losses.z,
    }
    coefficients["z_loss"] = config.moe_z_loss_coeff or 0.0
    total = routing.logits.new_zeros(())
    for kind, share in shares.items():
        if share is not None:
            total = total + share
            record_moe_loss(
                _LOGGED[kind],
                share.detach() / coefficients[kind],
                layer.layer_number,
                config.num_layers + (config.mtp_num_layers or 0),
                layer.groups.tp_dp_cp,
            )
    scale = _scale(config, layer.groups, routing.num_tokens)
    attached: Tensor = MoEAuxLossAutoScaler.apply(routing.weights, total * scale)
    return attached


def _scale(config: TransformerConfig, groups: ProcessGroupCollection, num_tokens: int) -> int:
    """Undo what Megatron will divide gradients by, so that shares sum to one loss.

    Without ``calculate_per_token_loss`` its scaler and its DDP leave a factor 1 / dp; with it
    gradients are divided by the tokens of all ranks and micro-batches.
    """
    if config.calculate_per_token_loss:
        return num_tokens
    dp: int = groups.tp_dp_cp.size() // (groups.tp.size() * groups.cp.size())
    return dp
