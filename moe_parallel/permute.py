"""Between tokens and rows: one row for each kept (token, slot) assignment, grouped by expert.

Both directions are gathers, forward and backward: each reads from a known place, so that sums run
in slot order and results are bit-identical from run to run (a scatter on a GPU adds with atomics).
With ``impl="triton"`` a sum reads each row once (:mod:`moe_parallel.kernels.slots`).

Example: 3 tokens, k = 2, the assignment of token 1 to expert 0 dropped::

    experts_Tk      (1, 0) (0, 2) (2, 1)
    by expert       expert 0: token 0    expert 1: tokens 0, 2    expert 2: tokens 1, 2
    assignment      1, 0, 5, 3, 4        index into [T * k]
    row             (1, 0) (-1, 3) (4, 2)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_parallel.counting import at_assignments, rows_before
from moe_parallel.derivatives import refuse_second_derivatives
from moe_parallel.gate import gate_dtype
from moe_parallel.impl import ChosenImpl
from moe_parallel.peer_memory import PeerMemory


class RowOrder(NamedTuple):
    """The rows a rank sends out and where each assignment went.

    Attributes:
        assignment: ``[A]``, for each row its assignment, token * k + slot; by expert, then token.
        row: ``[T, k]``, for each assignment its row, -1 if it was dropped.
        padded: some rows have no assignment, -1: they are zero.
    """

    assignment: Tensor
    row: Tensor
    padded: bool = False


def row_order(
    experts_Tk: Tensor, kept_Tk: Tensor | None, num_rows: int, num_experts: int
) -> RowOrder:
    """Group the kept assignments by expert; within an expert tokens keep their order.

    Args:
        experts_Tk: chosen experts, int64, each at most once a token; of dropped assignments any
            number.
        kept_Tk: which assignments are kept; None for all.
        num_rows: A, how many; known on the host, so that nothing here waits for the device.
        num_experts: E.
    """
    if kept_Tk is None:
        row_Tk = at_assignments(rows_before(experts_Tk, num_experts), experts_Tk)
        return RowOrder(_assignments(row_Tk, num_rows), row_Tk)
    # Dropped assignments queue behind those of the experts, and are cut off.
    experts_Tk = experts_Tk.masked_fill(~kept_Tk, num_experts)
    row_Tk = at_assignments(rows_before(experts_Tk, num_experts + 1), experts_Tk)
    assignment_A = _assignments(row_Tk.clamp(max=num_rows), num_rows + 1)[:num_rows]
    return RowOrder(assignment_A, row_Tk.masked_fill(~kept_Tk, -1))


def _assignments(row_Tk: Tensor, num_rows: int) -> Tensor:
    """Of each row its assignment."""
    assignments = torch.arange(row_Tk.numel(), device=row_Tk.device)
    return row_Tk.new_empty(num_rows).scatter_(0, row_Tk.flatten(), assignments)


def permute(
    x_TM: Tensor, order: RowOrder, impl: ChosenImpl = "eager", peers: PeerMemory | None = None
) -> Tensor:
    """Rows ``[A, hidden]``: a copy of its token for every kept assignment.

    With ``peers`` in their memory, which has room for them, until the next call there: no backward
    may keep them.

    Gradients: a token's is the sum of its rows' in slot order, in float32 or wider.
    """
    rows: Tensor = _Permute.apply(x_TM, *order, impl, peers)  # type: ignore[no-untyped-call]
    return rows


def unpermute(
    rows_AM: Tensor, weights_Tk: Tensor, order: RowOrder, impl: ChosenImpl = "eager"
) -> Tensor:
    """Tokens ``[T, hidden]``: the weighted sum of each token's rows, zero if it has none.

    Sums in slot order in float32 or wider, rounded once to the dtype of the rows.

    Gradients: to rows and weights; a dropped assignment's weight gets zero.
    """
    arguments = (rows_AM, weights_Tk, *order, impl)
    tokens: Tensor = _Unpermute.apply(*arguments)  # type: ignore[no-untyped-call]
    return tokens


def _token_rows(
    x_TM: Tensor, assignment_A: Tensor, top_k: int, padded: bool, out_AM: Tensor | None = None
) -> Tensor:
    """``[A, hidden]``: the token of each row, zero for a row without one."""
    token_A = assignment_A.div(top_k, rounding_mode="floor")
    if out_AM is None:
        out_AM = x_TM.new_empty(len(token_A), x_TM.shape[1])
    if x_TM.shape[0] == 0:
        return out_AM.zero_()
    torch.ops.aten.index.Tensor_out(x_TM, [token_A.clamp(min=0) if padded else token_A], out=out_AM)
    return out_AM.masked_fill_(token_A.unsqueeze(1) < 0, 0) if padded else out_AM


def _slot_rows(rows_AM: Tensor, row_T: Tensor) -> Tensor:
    """``[T, hidden]``: the row of one slot of every token, zero where there is none."""
    if rows_AM.shape[0] == 0:
        return rows_AM.new_zeros(row_T.shape[0], rows_AM.shape[1])
    return rows_AM[row_T.clamp(min=0)].masked_fill(row_T.unsqueeze(1) < 0, 0)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TM: Tensor,
        assignment_A: Tensor,
        row_Tk: Tensor,
        padded: bool,
        impl: ChosenImpl,
        peers: PeerMemory | None,
    ) -> Tensor:
        ctx.save_for_backward(row_Tk)
        ctx.impl = impl
        rows_AM = None if peers is None else peers.place(len(assignment_A), x_TM)
        return _token_rows(x_TM, assignment_A, row_Tk.shape[1], padded, rows_AM)

    @staticmethod
    @refuse_second_derivatives
    def backward(ctx: Any, grad_AM: Tensor) -> tuple[Tensor | None, ...]:
        (row_Tk,) = ctx.saved_tensors
        if ctx.impl == "triton":
            from moe_parallel import launch

            return launch.sum_slots(grad_AM, None, row_Tk), None, None, None, None, None
        dtype = gate_dtype(grad_AM.dtype)
        grad_TM = grad_AM.new_zeros(row_Tk.shape[0], grad_AM.shape[1], dtype=dtype)
        for row_T in row_Tk.unbind(1):
            grad_TM += _slot_rows(grad_AM, row_T)
        return grad_TM.to(grad_AM.dtype), None, None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_AM: Tensor,
        weights_Tk: Tensor,
        assignment_A: Tensor,
        row_Tk: Tensor,
        padded: bool,
        impl: ChosenImpl,
    ) -> Tensor:
        weights_Tk = weights_Tk.contiguous()
        ctx.save_for_backward(rows_AM, weights_Tk, assignment_A, row_Tk)
        ctx.padded, ctx.impl = padded, impl
        if impl == "triton":
            from moe_parallel import launch

            return launch.sum_slots(rows_AM, weights_Tk, row_Tk)
        dtype = torch.promote_types(gate_dtype(rows_AM.dtype), weights_Tk.dtype)
        output_TM = rows_AM.new_zeros(row_Tk.shape[0], rows_AM.shape[1], dtype=dtype)
        for weight_T, row_T in zip(weights_Tk.unbind(1), row_Tk.unbind(1)):
            output_TM += weight_T.unsqueeze(1) * _slot_rows(rows_AM, row_T)
        return output_TM.to(rows_AM.dtype)

    @staticmethod
    @refuse_second_derivatives
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        rows_AM, weights_Tk, assignment_A, row_Tk = ctx.saved_tensors
        if ctx.impl == "triton":
            from moe_parallel import launch

            tensors = (grad_TM, rows_AM, weights_Tk, row_Tk)
            return *launch.sum_slots_backward(*tensors, padded=ctx.padded), None, None, None, None
        grad_rows = _token_rows(grad_TM, assignment_A, row_Tk.shape[1], ctx.padded)
        grad_rows = grad_rows * _token_rows(weights_Tk.view(-1, 1), assignment_A, 1, ctx.padded)
        wide_TM = grad_TM.to(torch.promote_types(gate_dtype(rows_AM.dtype), weights_Tk.dtype))
        grad_weights = [(wide_TM * _slot_rows(rows_AM, row)).sum(1) for row in row_Tk.unbind(1)]
        return (
            grad_rows.to(rows_AM.dtype),
            torch.stack(grad_weights, 1).to(weights_Tk.dtype),
            None,
            None,
            None,
            None,
        )
