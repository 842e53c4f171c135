"""The loss of Megatron's GPTModel without the logits of all tokens.

Megatron's own cross entropy holds the logits of a rank whole: 6 bytes each at its peak, in bfloat16
and in float32. No release has a loss that is fused with the output layer.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lasp.hybrid.head import IGNORED, linear_cross_entropy
from lasp.megatron.checks import require


def fused_loss(
    *,
    hidden_states: Tensor,
    output_layer: nn.Module,
    output_weight: Tensor | None,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    config: TransformerConfig,
    **_: object,
) -> Tensor:
    """The summed loss, as an ``output_processor`` of ``GPTModel.forward`` (from 0.18 on).

    ``loss = model(tokens, positions, None, labels=labels, output_processor=fused_loss)``; Megatron
    passes the arguments below.

    Args:
        hidden_states: ``[T, B, hidden]``, of the final norm.
        output_layer: Megatron's, without bias.
        output_weight: that of the embedding where they share one, else None.
        labels: int64 ``[B, T]``, -100 where there is no target.
        loss_mask: ``[B, T]``, 0 where there is no target, as the caller of the model gave it; any
            other value counts as 1. None: the labels say it.
        config: Megatron's.

    Returns:
        The sum over the targets of this rank, a scalar, see
        :func:`lasp.hybrid.linear_cross_entropy`: do not apply a loss mask again. Megatron's own
        loss is ``[B, T]``.

    Gradients: to hidden states and weight.

    Raises:
        ValueError: without labels, and for a vocabulary that is cut over tensor parallel ranks.
    """
    require(config, "fused_loss", tensor_model_parallel_size=1, defer_embedding_wgrad_compute=False)
    if labels is None:
        raise ValueError(
            "labels must be given with output_processor=fused_loss, got None: leave the processor"
            " out for logits"
        )
    # Wrappers that gather weights late do it in hooks of the layer: call it, with no rows.
    with torch.no_grad():
        output_layer(hidden_states[:0].detach(), weight=output_weight)
    weight: Any = output_layer.weight if output_weight is None else output_weight
    if loss_mask is not None:
        labels = labels.masked_fill(loss_mask == 0, IGNORED)
    return linear_cross_entropy(
        hidden_states.flatten(0, 1), weight, labels.transpose(0, 1).flatten()
    )
