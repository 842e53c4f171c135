"""Parameters that ``torch.distributed`` has cut: this rank's part."""

from __future__ import annotations

from torch import Tensor


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, differentiable and of the same memory; else the tensor itself.

    DTensor is not imported: that takes a second, and few programs have one.
    """
    to_local = getattr(x, "to_local", None)
    if to_local is None:
        return x
    part: Tensor = to_local()
    return part
