"""Flash attention on CPUs, as PyTorch ships it."""

from __future__ import annotations

import torch
from torch import Tensor

from ring.blocks.interface import QKV, Block, Operands, bhtd, thd
from ring.blocks.merge import Partial
from ring.planner.window import CAUSAL, Window

aten = torch.ops.aten


class CpuFlashBlock(Block):
    """PyTorch's flash attention for CPUs; in 16 bits its lse is good to about 1e-5."""

    name = "cpu_flash"

    def obstacle(self, operands: Operands) -> str | None:
        """Refuse everything but CPU tensors of one head dim without a sliding window."""
        if operands.device.type != "cpu":
            return "needs CPU tensors"
        if operands.head_dim != operands.value_dim:
            return "needs values as wide as keys"
        return "takes no sliding window" if operands.slides else None

    def forward(self, qkv: QKV, *, window: Window, scale: float) -> Partial:
        """Run one kernel call."""
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(bhtd(x) for x in qkv), 0.0, window == CAUSAL, scale=scale
        )
        return Partial(thd(output), lse[0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, window: Window, scale: float
    ) -> QKV:
        """Run one kernel call."""
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(bhtd(x) for x in (doutput, *qkv, merged.output)),
            *(merged.lse.T[None], 0.0, window == CAUSAL),
            scale=scale,
        )
        return QKV(*(thd(x) for x in gradients))
