"""The RMSNorm of residual streams, whose backward reads its rows once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lasp._core.checks import check_not_negative, check_sizes
from lasp._core.impl import Impl, check_impl, chosen_impl
from lasp.lightning.triton.tuning import WIDEST_ROW


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, on GPUs by the kernels of :mod:`lasp.layers.norm_gate` without a gate.

    Torch has two kernels for its backward, one for the rows and one for the weight, and each reads
    the input and the gradient. Here one makes both.

    Args:
        size: of the last dim.
        eps: added to the mean square of a row.
        impl: see :func:`lasp.layers.norm_gate.norm_gate`; ``eager`` is torch's own norm.
        device: of the weight.
        dtype: of the weight.

    Gradients: to the input and the weight.

    Raises:
        ValueError: naming the argument; in the forward, if the last dim is another, and if ``impl``
            is ``triton`` where it cannot run.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(size=size)
        check_not_negative(eps=eps)
        check_impl(impl)
        super().__init__(size, eps, device=device, dtype=dtype)
        self.impl: Impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., size]`` normed, in its dtype; autocast does not change it."""
        width = x.shape[-1]
        if width != self.normalized_shape[0]:
            raise ValueError(
                f"x must be [..., {self.normalized_shape[0]}], got {list(x.shape)}: a norm is over"
                " the size that it was built with"
            )
        unserved = "" if width <= WIDEST_ROW else f"{width} features, above {WIDEST_ROW}"
        if chosen_impl(self.impl, x.device, x.dtype, unserved) == "eager":
            # Autocast on CUDA widens torch's norm, and with it what a 16-bit stream adds up.
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps).to(x.dtype)
        from lasp.layers.triton.norm_gate import call

        rows = x if x.dim() == 2 else x.reshape(-1, width)
        y: Tensor = call(rows, None, self.weight, self.eps, 1, False, False, "")[0]
        return y.view(x.shape)
