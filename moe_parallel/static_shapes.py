"""Whether the rows of calls of static shapes fitted, asked after the calls."""

from __future__ import annotations

import torch
from torch import nn

from lasp._core.checks import check_part
from moe_parallel.layer import ExpertParallelMoE


@torch.no_grad()
def check_max_rows(model: nn.Module) -> None:
    """Raise if rows were dropped for want of memory in any call since this was last asked.

    With ``MoEConfig(static_shapes=True, max_rows=...)`` a call cannot raise: a CUDA graph runs it.
    Ask after each step, before its gradients are used, or once in a while. All ranks know the same,
    so all raise. The host waits for the device, for one copy.

    Args:
        model: holds any number of expert layers.

    Raises:
        ValueError: naming the layers, and how many rows a rank's experts would have taken; and for
            what is no module.
    """
    check_part("model", model, nn.Module)
    noted = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ExpertParallelMoE) and layer.most_rows.value is not None:
            noted[name or "the layer"] = (layer.config.max_rows or 0, layer.most_rows.value)
    if not noted:
        return
    rows = torch.stack([value.amax() for _, value in noted.values()]).tolist()
    for _, value in noted.values():
        value.zero_()
    over = {
        name: most for (name, (max_rows, _)), most in zip(noted.items(), rows) if most > max_rows
    }
    if over:
        allowed = max(max_rows for name, (max_rows, _) in noted.items() if name in over)
        raise ValueError(
            f"max_rows must be at least {max(over.values())}, the rows that a rank's experts were"
            f" to take, got {allowed}: assignments were dropped in {over}. Allow more, and run the"
            " steps since the last check again"
        )
