"""What ``torch.autocast`` means to an operator of ours: the inputs come in its dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as ``torch.nn.Linear`` takes its input: cast where autocast is on, else as given.

    float64 is left alone, as autocast leaves it.

    Gradients: to the tensors, in their own dtypes.
    """
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(autocast_dtype(x)) for x in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an operator takes ``x`` in."""
    device = x.device.type
    # torch raises for meta. Its is_autocast_available() breaks graphs in torch 2.11.
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operators on the device of ``x`` as outside ``torch.autocast``; where it is off this is free.

    ``torch.autocast(..., enabled=False)`` takes 2 us to change nothing.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _NOTHING
    return torch.autocast(device, enabled=False)
