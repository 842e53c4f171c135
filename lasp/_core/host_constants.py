"""Small tensors that are made on the host, remembered, and used on a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device, *, wait: bool = False) -> Tensor:
    """``x``, which was made on the CPU to be remembered, on ``device``.

    Args:
        x: on the CPU.
        device: where it goes.
        wait: until it is there, for what streams share that know nothing of each other; else the
            current stream has it when it comes to its next work.

    Raises:
        RuntimeError: while a CUDA graph is captured. The graph would copy again in every replay,
            from memory of the host that has long been given to others.
    """
    if device.type != "cuda":
        return x.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "what a call copies to the GPU when it first meets a layout, counts, rates or shapes"
            f" must be there before a CUDA graph is captured, got a {x.dtype} tensor of shape"
            f" {tuple(x.shape)} to copy during capture: make the same call, forward and backward,"
            " once before capturing"
        )
    if wait or x.numel() == 0:  # nothing to pin
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
