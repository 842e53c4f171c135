"""What ``torch.autocast`` means to an operator of ours: the inputs come in its dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as ``torch.nn.Linear`` takes its input: cast where autocast is on, else as given.

    float64 is left alone, as autocast leaves it.

    Gradients: to the tensors, in their own dtypes.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
