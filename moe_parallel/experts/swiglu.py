"""SwiGLU of the experts' first product: ``silu(gate) * up``, and what its backward needs.

Both halves lie side by side in a row ``[gate, up]``. The backward computes the activation again:
what is kept of an expert's forward is its input and this row, no more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp._core.impl import ChosenImpl


def swiglu(hidden_A2F: Tensor, impl: ChosenImpl = "eager") -> Tensor:
    """``[A, F]``, computed in float32 or wider and rounded once."""
    if impl == "triton":
        from moe_parallel.kernels import swiglu as kernels

        return kernels.swiglu(hidden_A2F)
    gate, up = _wide(hidden_A2F).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(hidden_A2F.dtype)


def swiglu_backward(
    grad_AF: Tensor, hidden_A2F: Tensor, impl: ChosenImpl = "eager"
) -> tuple[Tensor, Tensor]:
    """The gradient of ``hidden_A2F``, and the activation ``[A, F]`` again.

    With s = sigmoid(gate)::

        dgate = grad up s (1 + gate (1 - s))        dup = grad gate s
    """
    if impl == "triton":
        from moe_parallel.kernels import swiglu as kernels

        return kernels.swiglu_backward(grad_AF, hidden_A2F)
    gate, up = _wide(hidden_A2F).chunk(2, dim=-1)
    grad, s = _wide(grad_AF), torch.sigmoid(gate)
    silu = gate * s
    dhidden = torch.cat((grad * up * (s + silu * (1 - s)), grad * silu), dim=-1)
    return dhidden.to(hidden_A2F.dtype), (silu * up).to(hidden_A2F.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
