"""Launches of the SwiGLU kernels. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_parallel.kernels import tuning
from moe_parallel.kernels.swiglu_kernel import swiglu_backward_kernel, swiglu_kernel


def swiglu(hidden_A2F: Tensor) -> Tensor:
    """See :func:`moe_parallel.experts.swiglu.swiglu`."""
    act = hidden_A2F.new_empty(hidden_A2F.shape[0], hidden_A2F.shape[1] // 2)
    _launch_swiglu(swiglu_kernel, (hidden_A2F.contiguous(), act), act)
    return act


def swiglu_backward(grad_AF: Tensor, hidden_A2F: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`moe_parallel.experts.swiglu.swiglu_backward`."""
    hidden_A2F, grad_AF = hidden_A2F.contiguous(), grad_AF.contiguous()
    dhidden, act = torch.empty_like(hidden_A2F), torch.empty_like(grad_AF)
    _launch_swiglu(swiglu_backward_kernel, (grad_AF, hidden_A2F, dhidden, act), act)
    return dhidden, act


def _launch_swiglu(kernel: object, tensors: tuple[Tensor, ...], act_AF: Tensor) -> None:
    num_rows, width = act_AF.shape
    if num_rows == 0:
        return
    columns = min(tuning.SWIGLU_COLUMNS, tuning.power_of_2(width))
    grid = (-(-num_rows // tuning.SWIGLU_ROWS) * -(-width // columns),)
    with torch.cuda.device_of(act_AF):
        kernel[grid](  # type: ignore[index]
            *tensors,
            num_rows,
            F=width,
            ROWS=tuning.SWIGLU_ROWS,
            COLUMNS=columns,
            num_warps=tuning.SWIGLU_WARPS,
        )
