"""SwiGLU of the experts' first product: ``silu(gate) * up``, and what its backward needs.

A row ``[gate, up]`` holds both halves. The backward computes the activation again, so the forward
of an expert keeps its input and this row, no more.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp._core.dtypes import wide_dtype
from lasp._core.impl import ChosenImpl

BLOCK_ROWS, BLOCK_COLUMNS = 4, 1024  # of a program; 1024 divides MiniMax-01's 9216
NUM_WARPS = 8


def swiglu(hidden_A2F: Tensor, impl: ChosenImpl = "eager") -> Tensor:
    """``[A, F]``, computed in float32 or wider and rounded once."""
    if impl == "triton":
        act_AF = hidden_A2F.new_empty(hidden_A2F.shape[0], hidden_A2F.shape[1] // 2)
        _launch("swiglu_kernel", (hidden_A2F.contiguous(), act_AF), act_AF)
        return act_AF
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
        hidden_A2F, grad_AF = hidden_A2F.contiguous(), grad_AF.contiguous()
        dhidden_A2F, act_AF = torch.empty_like(hidden_A2F), torch.empty_like(grad_AF)
        tensors = (grad_AF, hidden_A2F, dhidden_A2F, act_AF, None, None)
        _launch("swiglu_backward_kernel", tensors, act_AF)
        return dhidden_A2F, act_AF
    gate, up = hidden_A2F.to(wide_dtype(hidden_A2F.dtype)).chunk(2, dim=-1)
    grad, s = grad_AF.to(gate.dtype), torch.sigmoid(gate)
    silu = gate * s
    dhidden = torch.cat((grad * up * (s + silu * (1 - s)), grad * silu), dim=-1)
    return dhidden.to(hidden_A2F.dtype), (silu * up).to(hidden_A2F.dtype)


def weighted_swiglu_backward(
    grad_AF: Tensor, hidden_A2F: Tensor, weights_A: Tensor, impl: ChosenImpl = "eager"
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward needs where each row's activation is multiplied by a weight.

    Args:
        grad_AF: gradient of ``weight act``.
        hidden_A2F: as in the forward.
        weights_A: the weights, float32 or wider; ``triton`` takes float32.
        impl: see :func:`lasp._core.impl.chosen_impl`.

    Returns:
        The gradient of ``hidden_A2F``, ``weight act`` ``[A, F]``, and the gradients of the weights,
        ``grad act`` summed over each row.
    """
    if impl == "triton":
        hidden_A2F, grad_AF = hidden_A2F.contiguous(), grad_AF.contiguous()
        dhidden_A2F, act_AF = torch.empty_like(hidden_A2F), torch.empty_like(grad_AF)
        parts = weights_A.new_empty(-(-act_AF.shape[1] // BLOCK_COLUMNS), len(weights_A))
        tensors = (grad_AF, hidden_A2F, dhidden_A2F, act_AF, weights_A, parts)
        _launch("swiglu_backward_kernel", tensors, act_AF)
        return dhidden_A2F, act_AF, parts[0] if len(parts) == 1 else parts.sum(0)
    dtype = torch.promote_types(wide_dtype(hidden_A2F.dtype), weights_A.dtype)
    weights, hidden = weights_A.unsqueeze(1), hidden_A2F.to(dtype)
    dhidden, act = swiglu_backward(grad_AF.to(dtype), hidden)
    dweights_A = (grad_AF * act).sum(1)
    rounded = hidden_A2F.dtype
    return (dhidden * weights).to(rounded), (act * weights).to(rounded), dweights_A


@cache
def _triton() -> tuple[Any, Any]:
    """The kernels, and what launches them: an import takes half a microsecond in every call."""
    from lasp._core.launcher import launch
    from moe_parallel.kernels import swiglu_kernel

    return swiglu_kernel, launch


def _launch(kernel: str, tensors: tuple[Tensor | None, ...], act_AF: Tensor) -> None:
    kernels, launch = _triton()
    num_rows, width = act_AF.shape
    columns = min(BLOCK_COLUMNS, 1 << (width - 1).bit_length())
    programs = -(-num_rows // BLOCK_ROWS) * -(-width // columns)
    sizes = {"F": width, "ROWS": BLOCK_ROWS, "COLUMNS": columns}
    which = (getattr(kernels, kernel), act_AF.device, programs)
    launch(*which, *tensors, num_rows, **sizes, num_warps=NUM_WARPS)
