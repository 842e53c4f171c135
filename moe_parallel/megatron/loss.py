"""The auxiliary loss in Megatron's gradients and in its log."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp.megatron import record_moe_loss


def attach_aux_loss(
    probs: Tensor,
    share: Tensor,
    *,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    num_tokens: int,
    layer_number: int | None,
) -> Tensor:
    """``probs``, with whose gradients those of the auxiliary loss come.

    Args:
        probs: of the chosen experts.
        share: this rank's, of the loss over all tokens of the micro-batch.
        config: Megatron's, with a coefficient above 0.
        groups: tp, cp and tp_dp_cp.
        num_tokens: routed tokens of all ranks.
        layer_number: from 1, for the log.
    """
    if torch.is_grad_enabled():  # once of a layer that is recomputed, as Megatron's router
        record_moe_loss(
            "global_load_balancing_loss",
            share.detach() / config.moe_aux_loss_coeff,
            layer_number,
            config.num_layers,
            groups.tp_dp_cp,
        )
    attached: Tensor = MoEAuxLossAutoScaler.apply(probs, share * _scale(config, groups, num_tokens))
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
