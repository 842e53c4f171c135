"""SwiGLU of the experts' first product: ``silu(gate) * up``, and what its backward needs.

A row ``[gate, up]`` holds both halves. The backward computes the activation again, so the forward
of an expert keeps its input and this row, no more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp._core.dtypes import wide_dtype
from lasp._core.impl import ChosenImpl


def swiglu(hidden_A2F: Tensor, impl: ChosenImpl = "eager") -> Tensor:
    """``[A, F]``, computed in float32 or wider and rounded once."""
    if impl == "triton":
        from moe_parallel.kernels import swiglu as kernels

        return kernels.swiglu(hidden_A2F)
    gate, up = hidden_A2F.to(wide_dtype(hidden_A2F.dtype)).chunk(2, dim=-1)
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
    gate, up = hidden_A2F.to(wide_dtype(hidden_A2F.dtype)).chunk(2, dim=-1)
    grad, s = grad_AF.to(gate.dtype), torch.sigmoid(gate)
    silu = gate * s
    dhidden = torch.cat((grad * up * (s + silu * (1 - s)), grad * silu), dim=-1)
    return dhidden.to(hidden_A2F.dtype), (silu * up).to(hidden_A2F.dtype)
