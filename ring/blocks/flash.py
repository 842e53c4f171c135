"""FlashAttention-2 on NVIDIA GPUs, as PyTorch ships it."""

from __future__ import annotations

import torch
from torch import Tensor

from ring.blocks.interface import QKV, Block, Segments
from ring.blocks.merge import Partial

aten = torch.ops.aten


class FlashBlock(Block):
    """FlashAttention-2, dense and varlen: one varlen call covers all fragments of a rank.

    dq is bit-reproducible under ``torch.use_deterministic_algorithms(True)`` only.
    """

    name = "flash"
    max_head_dim = 256

    def obstacle(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Name the device, dtype or head dim that the kernels refuse."""
        if device.type != "cuda" or torch.version.cuda is None:
            return "needs tensors on an NVIDIA GPU"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or above"
        if dtype not in (torch.bfloat16, torch.float16):
            return "needs bfloat16 or float16"
        if head_dim % 8 or head_dim > self.max_head_dim:
            return f"needs a head dim that 8 divides, {self.max_head_dim} at most"
        return None

    def forward(self, qkv: QKV, *, causal: bool, scale: float) -> Partial:
        """Run one kernel call, whatever the shape."""
        lengths = (None, None, len(qkv.q), len(qkv.k))
        output, lse, *_ = aten._flash_attention_forward(
            *(x[None] for x in qkv), *lengths, 0.0, causal, False, scale=scale
        )
        return Partial(output[0], lse[0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, causal: bool, scale: float
    ) -> QKV:
        """Run one kernel call, whatever the shape."""
        tensors = (doutput, *qkv, merged.output, merged.lse.T.contiguous())
        lengths = (None, None, len(qkv.q), len(qkv.k))
        gradients = aten._flash_attention_backward(
            *(x[None] for x in tensors), *lengths, 0.0, causal, *_no_dropout(qkv.q), scale=scale
        )
        return QKV(*(x[0] for x in gradients))

    def forward_varlen(self, qkv: QKV, segments: Segments, *, scale: float) -> Partial:
        """Run one varlen call for all segments."""
        output, lse, *_ = aten._flash_attention_forward(
            *qkv, *segments.lengths, 0.0, segments.causal, False, scale=scale
        )
        return Partial(output, lse.T)

    def backward_varlen(
        self, doutput: Tensor, merged: Partial, qkv: QKV, segments: Segments, *, scale: float
    ) -> QKV:
        """Run one varlen call for all segments."""
        args = (doutput, *qkv, merged.output, merged.lse.T.contiguous(), *segments.lengths)
        rest = (0.0, segments.causal, *_no_dropout(qkv.q))
        return QKV(*aten._flash_attention_backward(*args, *rest, scale=scale))


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """The two random-state arguments of a flash backward, which only dropout reads."""
    return torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
