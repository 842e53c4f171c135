"""Launches of the kernels of tokens that cross once. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lasp._core.launcher import launch
from moe_parallel.kernels.tokens_kernel import (
    pack_gradients_kernel,
    pack_kernel,
    unpack_gradients_kernel,
    unpack_kernel,
)

TILE = 1024  # (row, slot) pairs of a program
NUM_WARPS = 4


def pack(
    experts_Tk: Tensor,
    row_Tk: Tensor,
    weights_Tk: Tensor,
    token_row_TP: Tensor,
    num_experts: int,
    sent: tuple[Tensor, Tensor],
) -> None:
    """Rows and weights of each token's slots into its rows for each rank.

    Args:
        experts_Tk: chosen experts.
        row_Tk: the row of each assignment among those that its expert takes, -1 if dropped.
        weights_Tk: float32.
        token_row_TP: the row of each token for each rank, -1 where it does not go.
        num_experts: E.
        sent: ``[A, k]``, int32 and float32, with the same distance in bytes between rows.
    """
    ranks = token_row_TP.shape[1]
    tensors = (experts_Tk.contiguous(), row_Tk, weights_Tk.contiguous(), token_row_TP, *sent)
    sizes = {"RANKS": ranks, "E_LOCAL": num_experts // ranks}
    _launch(pack_kernel, tensors, row_Tk, sent[0], sizes)


def unpack(
    rows: Tensor, weights: Tensor, num_rows: int, *, padded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``[A, k]`` int64 rows, ``[A, k]`` weights, and ``[num_rows]`` weights by row.

    Args:
        rows: ``[A, k]`` int32, as sent by :func:`pack`.
        weights: ``[A, k]`` float32, likewise.
        num_rows: that this rank's experts take.
        padded: some of them have no token, and weight 0.
    """
    row = rows.new_empty(rows.shape, dtype=torch.int64)
    of_slots, of_rows = weights.new_empty(weights.shape), weights.new_empty(num_rows)
    if padded:
        of_rows.zero_()
    _launch(unpack_kernel, (rows, weights, row, of_slots, of_rows), row, rows, {})
    return row, of_slots, of_rows


def pack_gradients(row_gradients: Tensor, row_Ak: Tensor, sent: Tensor) -> None:
    """Gradients of weights, by row, into the rows that go back, ``[A, k]`` float32."""
    _launch(pack_gradients_kernel, (row_gradients, row_Ak, sent), row_Ak, sent, {})


def unpack_gradients(
    experts_Tk: Tensor, token_row_TP: Tensor, num_experts: int, arrived: Tensor
) -> Tensor:
    """``[T, k]`` float32: the gradient of each weight, out of the row of its expert's rank."""
    experts_Tk, ranks = experts_Tk.contiguous(), token_row_TP.shape[1]
    gradients = arrived.new_empty(experts_Tk.shape)
    tensors = (experts_Tk, token_row_TP, arrived, gradients)
    sizes = {"RANKS": ranks, "E_LOCAL": num_experts // ranks}
    _launch(unpack_gradients_kernel, tensors, experts_Tk, arrived, sizes)
    return gradients


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    like_Ak: Tensor,
    travels: Tensor,
    sizes: dict[str, int],
) -> None:
    num_rows, top_k = like_Ak.shape
    padded = 1 << (top_k - 1).bit_length()
    sizes |= {"STRIDE": travels.stride(0), "K": top_k, "K_PAD": padded}
    rows = max(1, TILE // padded)
    programs, sizes["ROWS"] = -(-num_rows // rows), rows
    launch(kernel, like_Ak.device, programs, *tensors, num_rows, **sizes, num_warps=NUM_WARPS)
