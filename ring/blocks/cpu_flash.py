"""Flash attention on CPUs, as PyTorch ships it."""

from __future__ import annotations

import torch
from torch import Tensor

from ring.blocks.interface import QKV, Block, Operands, bhtd, thd
from ring.blocks.merge import Partial

aten = torch.ops.aten


class CpuFlashBlock(Block):
    """PyTorch's flash attention for CPUs; in 16 bits its lse is good to about 1e-5."""

    name = "cpu_flash"

    def obstacle(self, operands: Operands) -> str | None:
        """Refuse everything but CPU tensors of one head dim."""
        if operands.device.type != "cpu":
            return "needs CPU tensors"
        same = operands.head_dim == operands.value_dim
        return None if same else "needs values as wide as keys"

    def forward(self, qkv: QKV, *, causal: bool, scale: float) -> Partial:
        """Run one kernel call."""
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(bhtd(x) for x in qkv), 0.0, causal, scale=scale
        )
        return Partial(thd(output), lse[0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, causal: bool, scale: float
    ) -> QKV:
        """Run one kernel call."""
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(bhtd(x) for x in (doutput, *qkv, merged.output)),
            *(merged.lse.T[None], 0.0, causal),
            scale=scale,
        )
        return QKV(*(thd(x) for x in gradients))
