"""Launches of the kernels of tokens and their rows. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_parallel.kernels import tuning
from moe_parallel.kernels.slots_kernel import (
    copy_slots_kernel,
    sum_slots_backward_kernel,
    sum_slots_kernel,
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
    """Returns dweights and writes drows. A row belongs to one slot, if ``padded`` to none."""
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
