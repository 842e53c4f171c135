"""cuDNN's dense attention on NVIDIA GPUs, as PyTorch ships it."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.host_constants import to_device
from ring.blocks.flash import FlashBlock
from ring.blocks.interface import QKV, Operands, bhtd, thd
from ring.blocks.merge import Partial
from ring.planner.window import CAUSAL, Window

aten = torch.ops.aten


@tensor_cache(maxsize=64)  # devices
def _no_dropout(device: torch.device) -> Tensor:
    """A random seed and offset of a backward, which only dropout reads; kept."""
    with torch.inference_mode(False):  # kept, and used in training too
        return to_device(torch.zeros((), dtype=torch.int64, device="cpu"), device)


class CudnnBlock(FlashBlock):
    """cuDNN's dense attention: torch's fastest kernel, which builds a plan for each new shape.

    It takes what :class:`FlashBlock` takes, but one head dim up to 128, or keys of 192 and values
    of 128 (multi-head latent attention) from compute capability 9.0 on. It needs two keys. cuDNN's
    varlen form rebuilds its graph on every call (torch 2.11): the one here is FlashAttention's.
    """

    name = "cudnn"

    def obstacle(self, operands: Operands) -> str | None:
        """Return the obstacle of :class:`FlashBlock`, or name the head dims that cuDNN refuses."""
        if (obstacle := super().obstacle(operands)) is not None:
            return obstacle
        device, _, head_dim, value_dim, slides = operands
        if slides:
            return "takes no sliding window"
        if head_dim == value_dim <= 128:
            return None
        latent = (head_dim, value_dim) == (192, 128)
        if latent and torch.cuda.get_device_capability(device) >= (9, 0):
            return None
        return "needs one head dim of 128 at most, or 192 and 128 on compute capability 9.0"

    def forward(self, qkv: QKV, *, window: Window, scale: float) -> Partial:
        """Run one kernel call, whatever the shape."""
        output, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *(bhtd(x.contiguous()) for x in qkv), None, True, 0.0, window == CAUSAL, scale=scale
        )
        return Partial(thd(output), lse[0, :, :, 0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, window: Window, scale: float
    ) -> QKV:
        """Run one kernel call, whatever the shape."""
        lse_BHT1 = merged.lse.T.contiguous()[None, :, :, None]
        seed = _no_dropout(doutput.device)
        bias, lengths = None, (None, None, len(qkv.q), len(qkv.k))
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *(bhtd(x.contiguous()) for x in (doutput, *qkv, merged.output)),
            *(lse_BHT1, seed, seed, bias, *lengths, 0.0, window == CAUSAL),
            scale=scale,
        )
        return QKV(*(thd(x) for x in gradients))
