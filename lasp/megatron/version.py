"""The Megatron-Core versions these adapters are for, and what differs between them."""

from __future__ import annotations

from typing import Any

import megatron.core
from torch import Tensor

FIRST_VERSION, END_VERSION = (0, 16), (0, 21)
VERSION = tuple(map(int, megatron.core.__version__.split(".")[:2]))
if not FIRST_VERSION <= VERSION < END_VERSION:
    raise ImportError(
        f"megatron-core must be >= 0.16 and < 0.21, got {megatron.core.__version__}: install one of"
        " these, pip install 'lasp-plus[megatron]'"
    )


def record_moe_loss(
    name: str, share: Tensor, layer_number: int | None, num_layers: int, group: Any
) -> None:
    """Add a layer's loss of a micro-batch to what Megatron logs at the end of the step.

    Args:
        name: under which Megatron logs it.
        share: this rank's part.
        layer_number: from 1; without one nothing is logged, as Megatron's router does.
        num_layers: of the model.
        group: over all data parallel ranks too; the shares sum to the loss.
    """
    if VERSION >= (0, 18):
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().record(
            name, share, layer_number, num_layers, reduce_group=group, needs_dp_avg=False
        )
    else:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(
            name, share, layer_number, num_layers, reduce_group=group, reduce_group_has_dp=True
        )
