"""``impl="triton"``: launches of the kernels. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moe_parallel.kernels import tuning
from moe_parallel.kernels.slots_kernel import (
    copy_slots_kernel,
    sum_slots_backward_kernel,
    sum_slots_kernel,
)
from moe_parallel.kernels.swiglu_kernel import swiglu_backward_kernel, swiglu_kernel

COMPILED = isinstance(swiglu_kernel, triton.JITFunction)  # else interpreted, on the CPU


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


def copy_slots(x_TM: Tensor, row_Tk: Tensor, rows_AM: Tensor, *, padded: bool) -> Tensor:
    """Each token into its rows of ``rows_AM``; all are written, by zero if ``padded`` alone."""
    (tokens, top_k), width = row_Tk.shape, x_TM.shape[1]
    if padded:
        rows_AM.zero_()
    columns = min(tuning.SLOTS_COLUMNS, tuning.power_of_2(width))
    if tokens:
        with torch.cuda.device_of(rows_AM):
            copy_slots_kernel[(tokens * -(-width // columns),)](
                x_TM.contiguous(),
                row_Tk.contiguous(),
                rows_AM,
                M=width,
                K=top_k,
                COLUMNS=columns,
                num_warps=tuning.SLOTS_WARPS,
            )
    return rows_AM


def sum_slots(rows_AM: Tensor, weights_Tk: Tensor | None, row_Tk: Tensor) -> Tensor:
    """``[T, M]``: the sum of each token's rows, weighted if there are weights (float32)."""
    rows_AM, (tokens, top_k), width = rows_AM.contiguous(), row_Tk.shape, rows_AM.shape[1]
    out = rows_AM.new_empty(tokens, width)
    columns = min(tuning.SLOTS_COLUMNS, tuning.power_of_2(width))
    if tokens:
        with torch.cuda.device_of(out):
            sum_slots_kernel[(tokens * -(-width // columns),)](
                rows_AM,
                None if weights_Tk is None else weights_Tk.contiguous(),
                row_Tk.contiguous(),
                out,
                M=width,
                K=top_k,
                COLUMNS=columns,
                num_warps=tuning.SLOTS_WARPS,
            )
    return out


def sum_slots_backward(
    grad_TM: Tensor,
    rows_AM: Tensor,
    weights_Tk: Tensor,
    row_Tk: Tensor,
    drows_AM: Tensor,
    *,
    padded: bool,
) -> Tensor:
    """Of the weights; that of rows is written. A row belongs to one slot, to none if ``padded``."""
    (tokens, top_k), width = row_Tk.shape, rows_AM.shape[1]
    if padded:
        drows_AM.zero_()
    dweights = torch.empty_like(weights_Tk, memory_format=torch.contiguous_format)
    if tokens:
        with torch.cuda.device_of(drows_AM):
            sum_slots_backward_kernel[(tokens,)](
                grad_TM.contiguous(),
                rows_AM.contiguous(),
                weights_Tk.contiguous(),
                row_Tk.contiguous(),
                drows_AM,
                dweights,
                M=width,
                K=top_k,
                COLUMNS=min(tuning.SLOTS_COLUMNS, tuning.power_of_2(width)),
                num_warps=tuning.SLOTS_WARPS,
            )
    return dweights
